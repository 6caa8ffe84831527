"""The door: who comes in, what a request may be, and how everything that fails looks."""

from __future__ import annotations

import io
import json
import logging
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
from fastapi import FastAPI
from fastapi.responses import StreamingResponse
from fastapi.testclient import TestClient

from luthier.api import limits, logs
from luthier.api.app import create_app
from luthier.api.auth import Doorkeeper
from luthier.api.limits import Meter
from luthier.api.services import Services
from luthier.settings import Settings
from luthier.spec.errors import Broken, NotNow
from tests.api.conftest import BASE, FakeRouter, Live

UPLOAD = {"filename": "x", "purpose": "user_data", "bytes": 1, "mime_type": "text/plain"}


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(home=tmp_path / "home", bases=BASE, hub="off", max_body_bytes=2**20, requests_per_minute=600)


@pytest.fixture
def app(services: Services) -> FastAPI:
    """With routes more: three that go wrong, and a stream that tells how many streams there are."""
    app = create_app(services)

    @app.get("/v1/broken")
    def broken() -> None:
        raise RuntimeError("at sk-lu-abcdefghijklmnop, postgresql://me:hunter2@db/x")

    @app.get("/v1/streamed")
    def streamed() -> StreamingResponse:
        def lines() -> Iterator[bytes]:
            yield next(line for line in app.state.metrics.text().splitlines() if line.startswith(b"luthier_streams"))

        return StreamingResponse(lines(), media_type="text/event-stream")

    @app.get("/v1/late")
    def late() -> None:
        raise NotNow("The disk is full.", hint="Free some.")

    @app.get("/v1/ours")
    def ours() -> None:
        raise Broken("A blob is missing.")

    return app


@pytest.fixture
def client(app: FastAPI, key: str) -> Iterator[TestClient]:
    with TestClient(app, headers={"Authorization": f"Bearer {key}"}) as client:
        yield client


def error_of(answer: Any) -> dict[str, Any]:
    assert answer.headers["content-type"] == "application/json"
    body = answer.json()
    assert body.keys() == {"error"}
    assert body["error"].keys() == {"message", "type", "param", "code"}
    error: dict[str, Any] = body["error"]
    return error


# --- keys -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("header", [None, "", "Bearer", "Bearer ", "Basic eDp5", "sk-lu-x"])
def test_without_a_key_nothing_opens(client: TestClient, header: str | None) -> None:
    client.headers.pop("authorization")
    answer = client.get("/v1/models", headers={} if header is None else {"authorization": header})
    assert answer.status_code == 401
    assert error_of(answer)["code"] == "invalid_api_key"


@pytest.mark.parametrize("path", ["/v1/models", "/v1/nothing", "/v1", "/v1/files"])
def test_a_wrong_key_is_not_repeated(client: TestClient, path: str) -> None:
    answer = client.get(path, headers={"authorization": "Bearer sk-lu-nobodyknowsthis-tail"})
    assert answer.status_code == 401
    error = error_of(answer)
    assert (error["code"], error["message"]) == ("invalid_api_key", "Incorrect API key provided: sk-****tail.")
    assert answer.headers["x-request-id"].startswith("req_")


def test_sdk_with_a_wrong_key(live: Live) -> None:
    client = openai.OpenAI(base_url=live.base_url, api_key="sk-wrong", max_retries=0)
    with client, pytest.raises(openai.AuthenticationError) as caught:
        client.models.list()
    assert caught.value.code == "invalid_api_key"
    assert "sk-wrong" not in str(caught.value)


def test_a_revoked_key_stops_within_a_second(services: Services) -> None:
    now = [100.0]
    doorkeeper = Doorkeeper(services.keys, lambda: now[0])
    key, token = services.keys.create("x", "user")
    assert doorkeeper.remembered(token) == (False, None)
    assert doorkeeper.verify(token) == key
    services.keys.revoke(key.id)
    assert doorkeeper.remembered(token) == (True, key)
    now[0] += 1.01
    assert doorkeeper.remembered(token) == (False, None)
    assert doorkeeper.verify(token) is None
    assert doorkeeper.remembered(token) == (True, None)


# --- the shape of errors --------------------------------------------------------------------------------------------


def test_unknown_routes_and_methods(client: TestClient) -> None:
    for path in ("/v1/nothing", "/nothing", "/v1", "/v1/"):
        answer = client.get(path)
        assert answer.status_code == 404
        assert error_of(answer) == {
            "message": f"Invalid URL (GET {path})",
            "type": "invalid_request_error",
            "param": None,
            "code": None,
        }
    answer = client.put("/v1/models")
    assert answer.status_code == 405
    assert answer.headers["allow"] == "GET"
    assert "PUT" in error_of(answer)["message"]


def test_sdk_and_an_unknown_route(live: Live) -> None:
    client = openai.OpenAI(base_url=live.base_url, api_key=live.key, max_retries=0)
    with client, pytest.raises(openai.NotFoundError, match=r"Invalid URL \(GET /v1/nothing\)"):
        client.get("/nothing", cast_to=object)


@pytest.mark.parametrize(
    "body",
    [
        b"{",
        b"nope",
        b'{"filename": NaN}',
        b'{"bytes": 1e999}',
        b'{"bytes": 1, "bytes": 2}',
        b'{"filename": "\\ud83d"}',
        b'{"filename": "a\\u0000b"}',
        b'{"filename": "\xff"}',
        b"[" * 5000,
        b"[" * 50 + b'{"a":' * 60,
    ],
)
def test_what_is_not_strict_json_is_refused(client: TestClient, body: bytes) -> None:
    answer = client.post("/v1/uploads", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 400
    assert error_of(answer)["message"].startswith("We could not parse the JSON body of your request")


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"bytes": "1"}, "bytes"),
        ({"bytes": 1.5}, "bytes"),
        ({"bytes": True}, "bytes"),
        ({"filename": None}, "filename"),
        ({"surplus": 1}, "surplus"),
        ({"purpose": "x" * 100}, "purpose"),
        ({"expires_after": {"anchor": "created_at"}}, "expires_after.seconds"),
        ({"expires_after": {"anchor": "never", "seconds": 3600}}, "expires_after.anchor"),
        ({"expires_after": {"anchor": "created_at", "seconds": 3599}}, "expires_after.seconds"),
    ],
)
def test_validation_names_the_field(client: TestClient, change: dict[str, Any], param: str) -> None:
    answer = client.post("/v1/uploads", json={**UPLOAD, **change})
    assert answer.status_code == 400
    error = error_of(answer)
    assert (error["type"], error["param"]) == ("invalid_request_error", param)


def test_bodies_of_another_kind(client: TestClient) -> None:
    for request in (
        {"content": b""},
        {"json": []},
        {"json": "x"},
        {"json": None},
        {"content": json.dumps(UPLOAD).encode(), "headers": {"content-type": "text/plain"}},
    ):
        answer = client.post("/v1/uploads", **request)
        assert answer.status_code == 400, request
        assert "JSON" in error_of(answer)["message"]
    assert client.post("/v1/uploads", json={**UPLOAD, "expires_after": None}).status_code == 200


def test_bodies_above_the_limit(client: TestClient) -> None:
    headers = {"content-type": "application/json"}
    big = client.post("/v1/uploads", content=b"[" + b" " * 2**20 + b"]", headers=headers)
    assert (big.status_code, error_of(big)["code"]) == (413, "request_too_large")
    pieces = (b" " * 2**16 for _ in range(17))  # no Content-Length
    assert client.post("/v1/uploads", content=pieces, headers=headers).status_code == 413
    assert client.post("/v1/uploads", json=UPLOAD).status_code == 200


def test_our_own_faults_say_little_and_log_all(client: TestClient, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "luthier.api"):
        answer = client.get("/v1/broken")
    assert answer.status_code == 500
    assert answer.headers["x-should-retry"] == "false"
    error = error_of(answer)
    assert error["type"] == "server_error"
    assert answer.headers["x-request-id"] in error["message"]
    assert "sk-" not in answer.text
    lines = [logs.JsonLines().format(record) for record in caplog.records if record.name == "luthier.api"]
    fault, request = (json.loads(line) for line in lines)
    assert "RuntimeError" in fault["traceback"]
    assert fault["request_id"] == request["request_id"] == answer.headers["x-request-id"]
    assert "hunter2" not in lines[0]
    assert "abcdefghijklmnop" not in lines[0]


def test_errors_of_other_rooms_are_translated(client: TestClient) -> None:
    late = client.get("/v1/late")
    assert (late.status_code, error_of(late)["message"]) == (503, "The disk is full. Free some.")
    ours = client.get("/v1/ours")
    assert (ours.status_code, ours.headers["x-should-retry"]) == (500, "false")


# --- headers, logs, metrics, health ---------------------------------------------------------------------------------


def test_headers_that_clients_read(client: TestClient) -> None:
    first, second = client.get("/v1/models"), client.get("/v1/models")
    assert first.headers["x-request-id"] != second.headers["x-request-id"]
    assert first.headers["x-request-id"].startswith("req_")
    assert float(first.headers["openai-processing-ms"]) >= 0
    assert first.headers["openai-organization"] == "luthier"
    assert first.headers["openai-version"] == "2020-10-01"
    assert "request-id" not in first.headers
    assert first.headers["x-ratelimit-limit-requests"] == "600"
    assert int(second.headers["x-ratelimit-remaining-requests"]) < 600
    assert client.get("/healthz").headers["x-request-id"].startswith("req_")


def test_a_request_is_one_line_without_its_secrets(services: Services, key: str, client: TestClient) -> None:
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(logs.JsonLines())
    logger = logging.getLogger("luthier.api")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        client.get(f"/v1/files/{key}?after={key}")
    finally:
        logger.removeHandler(handler)
        logger.setLevel(logging.NOTSET)
    (line,) = stream.getvalue().splitlines()
    said = json.loads(line)
    assert (said["method"], said["route"], said["status"]) == ("GET", "/v1/files/{file_id:path}", 404)
    assert said["key"] == services.keys.list()[0].id
    assert said["ms"] >= 0
    assert key not in line


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("key sk-lu-AbC_123-xyz!", "key sk-****!"),
        ("Authorization: Bearer abc.def", "Authorization: Bearer ****"),
        ("postgresql://me:pw@host/db", "postgresql://me:****@host/db"),
        ("nothing here", "nothing here"),
    ],
)
def test_secrets_are_cut_out_of_log_lines(text: str, left: str) -> None:
    assert logs.redacted(text) == left


def test_health(client: TestClient, services: Services, monkeypatch: pytest.MonkeyPatch) -> None:
    client.headers.pop("authorization")
    assert client.get("/healthz").json() == {"status": "ok"}
    assert client.get("/readyz").json() == {"status": "ok"}
    with services.database.transaction() as connection:
        connection.exec_driver_sql("UPDATE alembic_version SET version_num = 'older'")
    answer = client.get("/readyz")
    assert (answer.status_code, error_of(answer)["code"]) == (503, "unready")
    assert client.get("/healthz").status_code == 200


def test_metrics_are_for_admins_and_this_machine(
    app: FastAPI, client: TestClient, admin_key: str, services: Services
) -> None:  # fmt: skip
    client.get("/v1/models")
    client.get("/v1/nothing")
    assert client.get("/v1/streamed").text == "luthier_streams 1.0"
    assert client.get("/metrics").status_code == 403
    answer = client.get("/metrics", headers={"authorization": f"Bearer {admin_key}"})
    assert answer.status_code == 200
    assert 'luthier_requests_total{method="GET",route="/v1/models",status="200"} 1.0' in answer.text
    assert 'luthier_requests_total{method="GET",route="none",status="404"} 1.0' in answer.text
    assert 'luthier_jobs{state="running"} 0.0' in answer.text
    assert "luthier_jobs_waiting 0.0" in answer.text
    assert "luthier_streams 0.0" in answer.text
    local = TestClient(app, client=("127.0.0.1", 5))
    assert local.get("/metrics").status_code == 200
    assert local.get("/metrics", headers={"x-forwarded-for": "10.0.0.1"}).status_code == 401


# --- limits ---------------------------------------------------------------------------------------------------------


def test_a_bucket_fills_evenly() -> None:
    now = [0.0]
    meter = Meter(60, lambda: now[0])
    assert [meter.take("a")[0] for _ in range(60)] == [0.0] * 60
    wait, headers = meter.take("a")
    assert wait == pytest.approx(1.0)
    assert headers["x-ratelimit-remaining-requests"] == "0"
    assert meter.take("b")[0] == 0.0
    now[0] = 2.5
    assert [meter.take("a")[0] for _ in range(3)] == [0.0, 0.0, pytest.approx(0.5)]


def test_too_many_requests(services: Services, key: str) -> None:
    settings = services.settings.model_copy(update={"requests_per_minute": 2})
    limited = Services(**{name: getattr(services, name) for name in Services.__slots__} | {"settings": settings})
    with TestClient(create_app(limited), headers={"Authorization": f"Bearer {key}"}) as client:
        assert [client.get("/v1/models").status_code for _ in range(2)] == [200, 200]
        answer = client.get("/v1/models")
        assert answer.status_code == 429
        error = error_of(answer)
        assert (error["type"], error["code"]) == ("rate_limit_error", "rate_limit_exceeded")
        assert 1 <= int(answer.headers["retry-after"]) <= 31
        assert answer.headers["x-ratelimit-remaining-requests"] == "0"
        assert client.get("/healthz").status_code == 200


# --- the server's life ----------------------------------------------------------------------------------------------


def test_the_router_lives_as_long_as_the_server(app: FastAPI, router: FakeRouter) -> None:
    assert not router.started
    with TestClient(app):
        assert router.started
    assert not router.started


def test_others_are_served_while_a_large_file_comes(live: Live) -> None:
    """The event loop stays free: while one client is inside its upload, another gets its answer."""
    inside, answered = threading.Event(), threading.Event()

    def slowly() -> Iterator[bytes]:
        yield b'--x\r\nContent-Disposition: form-data; name="file"; filename="f"\r\n\r\n{"a": "' + b"y" * 2**20
        inside.set()
        assert answered.wait(20)
        yield b'"}\r\n--x\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nfine-tune\r\n--x--\r\n'

    got: list[httpx2.Response] = []

    def send() -> None:
        headers = {"authorization": f"Bearer {live.key}", "content-type": "multipart/form-data; boundary=x"}
        got.append(httpx2.post(f"{live.base_url}/files", content=slowly(), headers=headers, timeout=30))

    thread = threading.Thread(target=send)
    thread.start()
    try:
        assert inside.wait(20)
        for _ in range(20):
            models = httpx2.get(f"{live.base_url}/models", headers={"authorization": f"Bearer {live.key}"})
            assert models.status_code == 200
    finally:
        answered.set()
        thread.join(30)
    assert got[0].status_code == 200, got[0].text
    assert got[0].json()["bytes"] == 2**20 + len('{"a": ""}')


def test_an_upload_that_breaks_off_leaves_nothing(live: Live, services: Services) -> None:
    def broken_off() -> Iterator[bytes]:
        yield b'--x\r\nContent-Disposition: form-data; name="file"; filename="f"\r\n\r\n' + b"y" * 2**20
        raise ConnectionError("gone")

    headers = {"authorization": f"Bearer {live.key}", "content-type": "multipart/form-data; boundary=x"}
    with pytest.raises(ConnectionError):
        httpx2.post(f"{live.base_url}/files", content=broken_off(), headers=headers)
    incoming = services.settings.home / "files" / "incoming"
    until = time.monotonic() + 20
    while incoming.exists() and list(incoming.iterdir()) and time.monotonic() < until:
        time.sleep(0.02)
    assert not incoming.exists() or list(incoming.iterdir()) == []
    assert services.files.list().data == ()


def test_the_document_describes_the_routes(client: TestClient) -> None:
    client.headers.pop("authorization")
    document = client.get("/openapi.json").json()
    assert document["components"]["securitySchemes"] == {"key": {"type": "http", "scheme": "bearer"}}
    create = document["paths"]["/v1/files"]["post"]
    assert create["security"] == [{"key": []}]
    assert "422" not in create["responses"]
    assert {"200", "400", "401", "413", "429"} <= create["responses"].keys()
    assert "multipart/form-data" in create["requestBody"]["content"]
    assert "security" not in document["paths"]["/healthz"]["get"]


def test_a_key_has_a_bound_of_open_requests(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "IN_FLIGHT", 1)
    inside, answered = threading.Event(), threading.Event()
    headers = {"authorization": f"Bearer {live.key}"}

    def slowly() -> Iterator[bytes]:
        yield b"{"
        inside.set()
        answered.wait(20)
        yield b"}"

    sender = threading.Thread(
        target=httpx2.post, args=(f"{live.base_url}/uploads",), kwargs={"content": slowly(), "headers": headers}
    )
    sender.start()
    try:
        assert inside.wait(20)
        until = time.monotonic() + 20
        while (answer := httpx2.get(f"{live.base_url}/models", headers=headers)).status_code == 200:
            assert time.monotonic() < until
    finally:
        answered.set()
        sender.join(30)
    assert (answer.status_code, answer.headers["retry-after"]) == (429, "1")
    assert httpx2.get(f"{live.base_url}/models", headers=headers).status_code == 200
