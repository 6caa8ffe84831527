"""Requests that somebody made to break the server, or that an old script really sends: each has a plain answer."""

from __future__ import annotations

import http.client
import json
import select
import socket
import time
from typing import Any
from urllib.parse import urlsplit

import pytest
from fastapi.testclient import TestClient

from luthier.api import form, heads, limits
from luthier.api.services import Services
from tests.api import driving
from tests.api.conftest import FakeRouter, Live

EDGE = "edge"
HUGE = 10**400
TURN = {"role": "user", "content": "hi"}


def refused(answer: Any, param: str | None, status: int = 400) -> str:
    """The message of a refusal that names `param`."""
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["param"] == param, error
    return str(error["message"])


def part(name: str, content: bytes = b"", filename: str | None = None) -> bytes:
    named = "" if filename is None else f'; filename="{filename}"'
    return f'--{EDGE}\r\nContent-Disposition: form-data; name="{name}"{named}\r\n\r\n'.encode() + content + b"\r\n"


def upload(client: TestClient, *parts: bytes) -> Any:
    content = b"".join(parts) + f"--{EDGE}--\r\n".encode()
    headers = {"Content-Type": f"multipart/form-data; boundary={EDGE}"}
    return client.post("/v1/files", content=content, headers=headers)


PURPOSE = part("purpose", b"user_data")
FILE = part("file", b"abc", "a.bin")


@pytest.mark.parametrize("value", [HUGE, -HUGE, 1e300])
@pytest.mark.parametrize(
    ("route", "field"),
    [
        ("/v1/fine_tuning/jobs", "seed"),
        ("/v1/fine_tuning/jobs", "hyperparameters.n_epochs"),
        ("/v1/fine_tuning/jobs", "hyperparameters.batch_size"),
        ("/v1/fine_tuning/jobs", "hyperparameters.learning_rate_multiplier"),
        ("/v1/fine-tunes", "n_epochs"),
        ("/v1/fine-tunes", "learning_rate_multiplier"),
        ("/v1/fine-tunes", "prompt_loss_weight"),
        ("/v1/fine-tunes", "classification_n_classes"),
    ],
)
def test_numbers_that_no_machine_holds(
    client: TestClient, services: Services, route: str, field: str, value: float
) -> None:
    holder, _, name = field.rpartition(".")
    body = driving.body(services) | ({holder: {name: value}} if holder else {name: value})
    refused(client.post(route, json=body), field)


def test_whole_numbers_with_a_point_are_whole(client: TestClient, services: Services) -> None:
    made = client.post("/v1/fine_tuning/jobs", json=driving.body(services, hyperparameters={"n_epochs": 3.0}, seed=7.0))
    assert (made.json()["hyperparameters"]["n_epochs"], made.json()["seed"]) == (3, 7)


@pytest.mark.parametrize("route", ["/v1/engines/tiny/completions", "/v1/engines/tiny/chat/completions"])
@pytest.mark.parametrize(
    "body",
    [
        b'{"prompt": "a", "prompt": "b"}',
        b'{"temperature": NaN}',
        b'{"user": "\\ud800"}',
        b'{"user": "\\u0000"}',
        b"\xff",
        b"",
        b"[" * 5000,
        json.dumps({"prompt": "a"}).encode("utf-16"),
    ],
)
@pytest.mark.parametrize("kind", ["application/json", "text/plain", ""])
def test_engines_read_strict_json_whatever_the_header_says(
    client: TestClient, route: str, body: bytes, kind: str
) -> None:
    answer = client.post(route, content=body, headers={"Content-Type": kind} if kind else {})
    assert "JSON" in refused(answer, None)


def test_a_form_that_says_a_thing_twice(client: TestClient) -> None:
    assert "twice" in refused(upload(client, PURPOSE, part("purpose", b"batch"), FILE), "purpose")
    assert "twice" in refused(upload(client, PURPOSE, FILE, FILE), "file")


def test_an_expiry_in_other_words_is_not_ignored(client: TestClient) -> None:
    whole = b'{"anchor": "created_at", "seconds": 3600}'
    for name in ("expires_after", "expires_after.seconds", "expires_after[days]"):
        assert "expires_after[seconds]" in refused(upload(client, PURPOSE, FILE, part(name, whole)), "expires_after")
    anchor, seconds = part("expires_after[anchor]", b"created_at"), part("expires_after[seconds]", b"3600")
    refused(upload(client, PURPOSE, FILE, anchor), "expires_after.seconds")
    refused(upload(client, PURPOSE, FILE, seconds), "expires_after.anchor")
    made = upload(client, seconds, FILE, anchor, PURPOSE).json()
    assert made["expires_at"] == made["created_at"] + 3600


def test_names_of_files(client: TestClient) -> None:
    assert "4,096" in refused(upload(client, PURPOSE, part("file", b"abc", "a" * 4097)), "file")
    body = {"filename": "a" * 4097, "purpose": "user_data", "bytes": 1, "mime_type": "text/plain"}
    refused(client.post("/v1/uploads", json=body), "filename")
    refused(client.post("/v1/uploads", json={**body, "filename": "a", "mime_type": "x" * 257}), "mime_type")
    for name in ("../../etc/passwd", "dir/x.jsonl", "https://there/x?y=z#a", "<script>", "\N{SNOWMAN}"):
        made = upload(client, PURPOSE, part("file", b"abc", name)).json()
        assert made["filename"] == name
        assert client.get(f"/v1/files/{made['id']}/content").content == b"abc"


def test_an_id_that_ends_like_another_route(client: TestClient) -> None:
    """The oldest command asks for any path that it is given as if it were an id."""
    made = upload(client, PURPOSE, FILE).json()["id"]
    for path in (f"{made}%2Fcontent", f"{made}%2fcontent", "..%2F..%2Fetc%2Fpasswd", "x%00", "%FF", f"{made}%0A"):
        answer = client.get(f"/v1/files/{path}")
        assert answer.status_code == 404, path
        assert answer.json()["error"]["message"]
    assert client.get(f"/v1/files/{made}/content").content == b"abc"


@pytest.mark.parametrize("arguments", ["not json", '{"cut": "of', "", '"text in text"', '{"a": 1, "a": 2}'])
@pytest.mark.parametrize("legacy", [False, True])
def test_a_call_of_the_model_comes_back_as_it_was(
    client: TestClient, router: FakeRouter, arguments: str, legacy: bool
) -> None:
    call = {"name": "f", "arguments": arguments}
    calls: dict[str, Any] = (
        {"function_call": call} if legacy else {"tool_calls": [{"id": "c", "type": "function", "function": call}]}
    )
    result = {"role": "function", "name": "f"} if legacy else {"role": "tool", "tool_call_id": "c"}
    messages = [TURN, {"role": "assistant", "content": None, **calls}, {**result, "content": "1"}]
    answer = client.post("/v1/chat/completions", json={"model": "tiny", "messages": messages})
    assert answer.status_code == 200, answer.text
    assert router.asks


def test_a_body_that_trickles_is_given_up(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "BODY_SECONDS", 0.3)
    head = "Content-Type: application/json\r\nContent-Length: 1000"
    for path in ("/v1/chat/completions", "/v1/fine_tuning/jobs", "/v1/engines/tiny/completions", "/v1/nothing"):
        assert trickled(live, path, head, b'{"model": ') == 408


def test_a_form_that_trickles_is_given_up(live: Live, services: Services, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(form, "PATIENCE_SECONDS", 0.3)
    head = f"Content-Type: multipart/form-data; boundary={EDGE}\r\nTransfer-Encoding: chunked"
    begun = PURPOSE + FILE
    assert trickled(live, "/v1/files", head, f"{len(begun):x}\r\n".encode() + begun + b"\r\n") == 408
    assert not services.files.list().data
    incoming = services.settings.home / "files" / "incoming"
    assert not incoming.exists() or not list(incoming.iterdir())


def test_headers_without_an_end(live: Live) -> None:
    with line_to(live) as line:
        line.sendall(b"GET /v1/models HTTP/1.1\r\nHost: x\r\nX-Long: ")
        for _ in range(40):
            line.sendall(b"a" * 8192)
            time.sleep(0.005)
            if select.select([line], [], [], 0)[0]:
                break
        assert answered(line) == (431, {"error"})


def test_headers_that_trickle_are_given_up(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heads, "HEAD_SECONDS", 0.3)
    for begun in (b"", b"GET /v1/mod", b"GET /v1/models HTTP/1.1\r\nHost: x\r\n"):
        with line_to(live) as line:
            line.sendall(begun)
            assert answered(line) == (408, {"error"})


def test_what_is_no_http(live: Live) -> None:
    with line_to(live) as line:
        line.sendall(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03")  # somebody speaks TLS
        assert answered(line) == (400, {"error"})


def test_one_connection_carries_many_heads(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bounds are of each head, not of a connection."""
    monkeypatch.setattr(heads, "HEAD_BYTES", 4096)
    with line_to(live) as line:
        for _ in range(8):
            padding = f"X-Padding: {'a' * 3000}\r\n"
            asked = f"GET /v1/models HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {live.key}\r\n{padding}\r\n".encode()
            line.sendall(asked[:1500])
            time.sleep(0.01)
            line.sendall(asked[1500:])
            assert answered(line)[0] == 200


def line_to(live: Live) -> socket.socket:
    there = urlsplit(live.base_url)
    return socket.create_connection((there.hostname, there.port), timeout=20)


def answered(line: socket.socket) -> tuple[int, set[str]]:
    """(status, the JSON body's keys) of what comes next on `line`."""
    said = http.client.HTTPResponse(line)
    said.begin()
    return said.status, set(json.loads(said.read()))


def trickled(live: Live, path: str, head: str, begun: bytes) -> int:
    """The status that answers a request whose body begins and does not go on."""
    with line_to(live) as line:
        line.sendall(f"POST {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {live.key}\r\n{head}\r\n\r\n".encode())
        line.sendall(begun)
        deadline, said = time.monotonic() + 20, b""
        while b"\r\n\r\n" not in said and time.monotonic() < deadline:
            said += line.recv(65536)
    assert b"sk-" not in said
    return int(said.split()[1])
