"""Files and uploads, through the official SDK and by hand."""

from __future__ import annotations

import base64
import hashlib
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from fastapi.testclient import TestClient

from luthier.api.services import Services
from luthier.settings import Settings
from tests.api.conftest import BASE, Live

ROW = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]}
ROWS = "".join(json.dumps(ROW) + "\n" for _ in range(3)).encode()


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(home=tmp_path / "home", bases=BASE, hub="off", max_file_bytes=70 * 2**20, max_body_bytes=2**20)


@pytest.fixture
def sdk(live: Live) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=live.base_url, api_key=live.key, max_retries=0) as client:
        yield client


def form(*parts: tuple[str, str | None, bytes], boundary: str = "b0undary") -> tuple[bytes, dict[str, str]]:
    """A multipart body of (name, filename, content) in that order, and its headers."""
    body = b""
    for name, filename, content in parts:
        named = b"" if filename is None else b'; filename="' + filename.encode() + b'"'
        body += b"--" + boundary.encode() + b'\r\nContent-Disposition: form-data; name="' + name.encode() + b'"' + named
        body += b"\r\n\r\n" + content + b"\r\n"
    body += b"--" + boundary.encode() + b"--\r\n"
    return body, {"content-type": f"multipart/form-data; boundary={boundary}"}


def post(client: TestClient, *parts: tuple[str, str | None, bytes]) -> Any:
    body, headers = form(*parts)
    return client.post("/v1/files", content=body, headers=headers)


def upload(client: TestClient, content: bytes = ROWS, purpose: str = "fine-tune", filename: str = "a.jsonl") -> Any:
    return post(client, ("purpose", None, purpose.encode()), ("file", filename, content))


# --- the official SDK: acceptance checks 1, 2, 5-10 -----------------------------------------------------------------


def test_sdk_uploads_from_a_path_bytes_and_a_tuple(sdk: openai.OpenAI, tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    path.write_bytes(ROWS)
    named = io.BytesIO(ROWS)
    named.name = "named.jsonl"
    for given, filename in [(path, "train.jsonl"), (named, "named.jsonl"), (("pair.jsonl", ROWS), "pair.jsonl")]:
        file = sdk.files.create(file=given, purpose="fine-tune")
        assert file.id.startswith("file-")
        assert (file.object, file.bytes, file.filename) == ("file", len(ROWS), filename)
        assert (file.purpose, file.status, file.expires_at) == ("fine-tune", "processed", None)
        assert sdk.files.wait_for_processing(file.id).status == "processed"


def test_sdk_expiry(sdk: openai.OpenAI) -> None:
    file = sdk.files.create(file=ROWS, purpose="fine-tune", expires_after={"anchor": "created_at", "seconds": 3600})
    assert file.expires_at == file.created_at + 3600
    with pytest.raises(openai.BadRequestError) as caught:
        sdk.files.create(file=ROWS, purpose="fine-tune", expires_after={"anchor": "created_at", "seconds": 3599})
    assert caught.value.param == "expires_after.seconds"
    batch = sdk.files.create(file=b"{}", purpose="batch")
    assert batch.expires_at == batch.created_at + 30 * 24 * 3600


def test_sdk_pages_through_the_list(sdk: openai.OpenAI) -> None:
    ids = [sdk.files.create(file=ROWS, purpose="fine-tune").id for _ in range(4)]
    other = sdk.files.create(file=b"x", purpose="user_data").id
    assert [file.id for file in sdk.files.list(limit=2)] == [other, *reversed(ids)]
    assert [file.id for file in sdk.files.list(purpose="fine-tune", limit=2)] == ids[::-1]
    assert [file.id for file in sdk.files.list(order="asc")] == [*ids, other]


def test_sdk_content_and_delete(sdk: openai.OpenAI) -> None:
    content = ROWS + "你好 \u0301\u200d\n".join(["", ""]).encode()
    file = sdk.files.create(file=("x", content), purpose="user_data")
    assert sdk.files.content(file.id).read() == content
    assert sdk.files.delete(file.id).deleted is True
    with pytest.raises(openai.NotFoundError) as caught:
        sdk.files.retrieve(file.id)
    assert caught.value.param == "id"
    assert caught.value.code is None
    assert str(caught.value).endswith(f"No such File object: {file.id}")
    assert (caught.value.request_id or "").startswith("req_")


@pytest.mark.parametrize("name", ["a/b.jsonl", "x/content", "../../etc/passwd", "http://host/x.jsonl", "a\0b"])
def test_sdk_asks_for_a_path(sdk: openai.OpenAI, name: str) -> None:
    with pytest.raises(openai.NotFoundError):
        sdk.files.retrieve(name)


def test_sdk_uploads_a_line_that_is_not_json(sdk: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="Line 2") as caught:
        sdk.files.create(file=("bad.jsonl", ROWS.splitlines(True)[0] + b"{nope}\n"), purpose="fine-tune")
    assert caught.value.code is None


def test_sdk_uploads_in_parts(sdk: openai.OpenAI, tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    path.write_bytes(ROWS)
    done = sdk.uploads.upload_file_chunked(
        file=path, mime_type="text/jsonl", purpose="fine-tune", part_size=100, md5=hashlib.md5(ROWS).hexdigest()
    )
    assert done.status == "completed"
    assert done.file is not None
    assert (done.file.filename, done.file.bytes) == ("train.jsonl", len(ROWS))
    assert sdk.files.content(done.file.id).read() == ROWS


def test_sdk_upload_refusals(sdk: openai.OpenAI) -> None:
    upload = sdk.uploads.create(bytes=4, filename="x", mime_type="text/plain", purpose="user_data")
    assert (upload.status, upload.expires_at, upload.file) == ("pending", upload.created_at + 3600, None)
    part = sdk.uploads.parts.create(upload.id, data=b"abcd")
    assert (part.object, part.upload_id) == ("upload.part", upload.id)
    with pytest.raises(openai.BadRequestError) as caught:
        sdk.uploads.complete(upload.id, part_ids=[part.id], md5="0" * 32)
    assert caught.value.param == "md5"
    with pytest.raises(openai.BadRequestError):
        sdk.uploads.complete(upload.id, part_ids=["part_nope"])
    assert sdk.uploads.cancel(upload.id).status == "cancelled"
    with pytest.raises(openai.BadRequestError):
        sdk.uploads.parts.create(upload.id, data=b"abcd")
    with pytest.raises(openai.NotFoundError):
        sdk.uploads.cancel("upload_" + "a" * 24)
    with pytest.raises(openai.BadRequestError) as caught:
        sdk.uploads.create(bytes=8 * 2**30 + 1, filename="x", mime_type="text/plain", purpose="user_data")
    assert caught.value.param == "bytes"


def test_a_training_file_in_parts_is_checked_as_one(sdk: openai.OpenAI) -> None:
    upload = sdk.uploads.create(bytes=8, filename="x", mime_type="text/plain", purpose="fine-tune")
    parts = [sdk.uploads.parts.create(upload.id, data=data).id for data in (b'{"a', b'":1}\n')]
    wrong = [parts[1], parts[0]]
    with pytest.raises(openai.BadRequestError, match="Line 1"):
        sdk.uploads.complete(upload.id, part_ids=wrong)
    assert sdk.uploads.complete(upload.id, part_ids=parts).status == "completed"


@pytest.mark.parametrize(
    "path", ["..%2f..%2fetc%2fpasswd/content", "..%2f..%2fetc%2fpasswd", "%2e%2e/luthier.db", "%00"]
)
def test_an_id_is_no_path(client: TestClient, path: str) -> None:
    for answer in (client.get(f"/v1/files/{path}"), client.delete(f"/v1/files/{path}")):
        assert answer.status_code == 404
        assert answer.json()["error"]["code"] is None


# --- forms ----------------------------------------------------------------------------------------------------------


def test_the_file_may_come_first_in_chunks_without_a_length(client: TestClient) -> None:
    body, headers = form(("file", "node.jsonl", ROWS), ("purpose", None, b"fine-tune"), ("model", None, b"ada"))
    answer = client.post("/v1/files", content=(body[i : i + 7] for i in range(0, len(body), 7)), headers=headers)
    assert answer.status_code == 200, answer.text
    assert (answer.json()["filename"], answer.json()["bytes"]) == ("node.jsonl", len(ROWS))


@pytest.mark.parametrize(
    "filename", ["../../evil.jsonl", "..\\evil", "/etc/x", "a\0b", "x" * 4000, "naïve 你好.jsonl", "dir/x.jsonl"]
)
def test_a_name_is_data(client: TestClient, services: Services, filename: str) -> None:
    answer = upload(client, filename=filename)
    assert answer.status_code == 200, answer.text
    assert answer.json()["filename"] == filename
    assert client.get(f"/v1/files/{answer.json()['id']}").json() == answer.json()
    home = services.settings.home
    kept = [path.relative_to(home) for path in home.rglob("*") if path.is_file() and path.name[:7] != "luthier"]
    assert [str(path) for path in kept] == [f"files/{kept[0].name[:2]}/{kept[0].name}"]


def test_a_form_must_be_whole_and_right(client: TestClient) -> None:
    def said(answer: Any) -> tuple[int, str | None]:
        return answer.status_code, answer.json()["error"]["param"]

    assert said(post(client, ("purpose", None, b"fine-tune"))) == (400, "file")
    assert said(post(client, ("file", "x", ROWS))) == (400, "purpose")
    assert said(upload(client, purpose="fine-tune-results")) == (400, "purpose")
    assert said(post(client, ("file", "x", ROWS), ("file", "y", ROWS))) == (400, "file")
    assert said(post(client, ("purpose", None, b"x" * 20_000))) == (400, "purpose")
    assert said(client.post("/v1/files", json={"file": "x"})) == (400, None)
    body, headers = form(("purpose", None, b"user_data"), ("file", "x", b"12345"))
    assert said(client.post("/v1/files", content=body[:-20], headers=headers)) == (400, None)
    assert said(client.post("/v1/files", content=b"nothing of the kind", headers=headers)) == (400, None)
    assert client.get("/v1/files").json()["data"] == []


def test_a_file_above_the_limit_is_refused_by_its_length_and_by_its_content(
    client: TestClient, services: Services
) -> None:  # fmt: skip
    piece = b"x" * 2**20
    body, headers = form(("purpose", None, b"user_data"), ("file", "x", b"@"))
    before, after = body.split(b"@")

    def sent() -> Iterator[bytes]:
        yield before
        for _ in range(71):
            yield piece
        yield after

    assert client.post("/v1/files", content=sent(), headers=headers).status_code == 413
    assert client.post("/v1/files", content=b"", headers={**headers, "content-length": "99999999"}).status_code == 413
    assert list((services.settings.home / "files" / "incoming").iterdir()) == []


# --- what a training file must be -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b"", "empty"),
        (b"\n \n", "empty"),
        (b"[1]\n", "Line 1 is not an object"),
        (ROWS + b"17", "Line 4 is not an object"),
        (ROWS + b"\n{", "Line 5"),
        (ROWS.decode().encode("utf-16"), "UTF-16"),
        (b'{"a": "caf\xe9"}\n', "Line 1 is not UTF-8: byte 11"),
        (b'{"a": "\\ud83d"}\n', "Line 1, a: found half"),
        (b'{"a": 1, "a": 2}\n', "Line 1"),
        (b'{"a": NaN}\n', "Line 1"),
    ],
)
def test_training_files_that_are_refused(client: TestClient, content: bytes, named: str) -> None:
    answer = upload(client, content)
    assert answer.status_code == 400
    assert named in answer.json()["error"]["message"]
    assert answer.json()["error"]["param"] == "file"


@pytest.mark.parametrize(
    "content",
    [
        ROWS.decode().encode("utf-8-sig"),
        ROWS.replace(b"\n", b"\r\n"),
        ROWS.rstrip(),
        ROWS + b"\n\n",
        b'{"a": "\\u0000"}',
    ],
)
def test_training_files_that_are_taken(client: TestClient, content: bytes) -> None:
    answer = upload(client, content)
    assert answer.status_code == 200, answer.text
    assert client.get(f"/v1/files/{answer.json()['id']}/content").content == content


def test_one_huge_line_is_named(client: TestClient) -> None:
    answer = upload(client, b'{"a": 1}\n{"a": "' + b"x" * (60 * 2**20) + b'"}\n{"a": 1}\n')
    assert answer.status_code == 400
    assert "Line 2 is longer than" in answer.json()["error"]["message"]


# --- result files ---------------------------------------------------------------------------------------------------


def test_results_are_base64_for_modern_clients_only(client: TestClient, services: Services) -> None:
    csv = b"step,train_loss\n1,2.5\n"
    modern = services.files.create([csv], filename="step_metrics.csv", purpose="fine-tune-results").id
    legacy = services.files.create([csv], filename="compiled_results.csv", purpose="fine-tune-results").id
    answer = client.get(f"/v1/files/{modern}/content")
    assert answer.headers["content-type"] == "application/octet-stream"
    assert base64.b64decode(answer.content, validate=True) == csv
    old = {"user-agent": "OpenAI/v1 PythonBindings/0.28.1"}
    assert client.get(f"/v1/files/{modern}/content", headers=old).content == csv
    assert client.get(f"/v1/files/{legacy}/content").content == csv


def test_an_expired_file_is_gone(client: TestClient, services: Services) -> None:
    body, headers = form(
        ("purpose", None, b"user_data"),
        ("expires_after[anchor]", None, b"created_at"),
        ("expires_after[seconds]", None, b"3600"),
        ("file", "x", b"1"),
    )
    file = client.post("/v1/files", content=body, headers=headers).json()
    services.database.clock = lambda: file["expires_at"]
    assert client.get(f"/v1/files/{file['id']}").status_code == 404
    assert client.get("/v1/files").json()["data"] == []


def test_list_parameters(client: TestClient) -> None:
    first, second = (upload(client).json()["id"] for _ in range(2))
    page = client.get("/v1/files?limit=1").json()
    assert (page["object"], page["first_id"], page["last_id"], page["has_more"]) == ("list", second, second, True)
    assert [file["id"] for file in client.get(f"/v1/files?starting_after={second}").json()["data"]] == [first]
    for query, param in [("limit=0", "limit"), ("limit=x", "limit"), ("order=up", "order"), ("after=nope", "after")]:
        answer = client.get(f"/v1/files?{query}")
        assert answer.status_code in (400, 404)
        assert answer.json()["error"]["param"] == param
