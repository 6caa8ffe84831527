"""Acceptance checks 1, 2, 5-10 and 48 with the official Python client (1.x and later): files, uploads, errors."""

from __future__ import annotations

import hashlib
import io
import json
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import openai
from harness import raises, run

client = openai.OpenAI()
ROWS = b"".join(
    json.dumps({"messages": [{"role": "user", "content": f"u{n}"}, {"role": "assistant", "content": "a"}]}).encode()
    + b"\n"
    for n in range(12)
)


def check_01_files_from_a_path_a_handle_and_bytes(given):
    with TemporaryDirectory() as folder:
        path = Path(folder) / "from path.jsonl"
        path.write_bytes(ROWS)
        named = io.BytesIO(ROWS)
        named.name = "named.jsonl"
        for file, name in [
            (path, "from path.jsonl"),
            (named, "named.jsonl"),
            (("tuple-ü.jsonl", ROWS), "tuple-ü.jsonl"),
            (path.open("rb"), "from path.jsonl"),
        ]:
            made = client.files.create(file=file, purpose="fine-tune")
            assert made.id.startswith("file-"), made
            assert (made.bytes, made.filename, made.purpose, made.object) == (len(ROWS), name, "fine-tune", "file")
            assert abs(made.created_at - time.time()) < 60
            if hasattr(file, "close"):
                file.close()


def check_02_files_that_expire(given):
    def create(seconds):
        expires = {"anchor": "created_at", "seconds": seconds}
        return client.files.create(file=("e.jsonl", ROWS), purpose="fine-tune", expires_after=expires)

    made = create(3600)
    assert made.expires_at == made.created_at + 3600, made
    with raises(openai.BadRequestError):
        create(3599)


def check_05_wait_for_processing(given):
    made = client.files.create(file=("w.jsonl", ROWS), purpose="fine-tune")
    began = time.monotonic()
    assert client.files.wait_for_processing(made.id).status == "processed"
    assert time.monotonic() - began < 6


def check_06_lists_page_by_themselves(given):
    made = [client.files.create(file=(f"{n}.bin", b"x" * (n + 1)), purpose="user_data").id for n in range(5)]
    listed = [file.id for file in client.files.list(limit=2, purpose="user_data")]
    mine = [one for one in listed if one in made]
    assert mine == made[::-1]
    assert len(set(listed)) == len(listed)
    assert all(file.purpose == "user_data" for file in client.files.list(purpose="user_data"))
    up = [file.id for file in client.files.list(limit=2, purpose="user_data", order="asc") if file.id in made]
    assert up == made
    for one in made:
        client.files.delete(one)


def check_07_content_and_delete(given):
    content = bytes(range(256)) * 41
    made = client.files.create(file=("all bytes.bin", content), purpose="user_data")
    assert client.files.content(made.id).read() == content
    gone = client.files.delete(made.id)
    assert (gone.deleted, gone.id, gone.object) == (True, made.id, "file")
    with raises(openai.NotFoundError) as error:
        client.files.retrieve(made.id)
    assert error.value.param == "id"
    assert error.value.request_id
    assert error.value.body["message"].startswith(f"No such File object: {made.id}")
    assert error.value.code is None


def check_08_an_id_with_a_slash(given):
    for name in ("a/b.jsonl", "x/content", "../../etc/passwd", "http://there/x.jsonl"):
        with raises(openai.NotFoundError) as error:
            client.files.retrieve(name)
        assert error.value.body["message"], name


def check_09_the_line_that_is_no_json_is_named(given):
    broken = ROWS.splitlines(keepends=True)
    broken[1] = b'{"messages": oops\n'
    with raises(openai.BadRequestError) as error:
        client.files.create(file=("broken.jsonl", b"".join(broken)), purpose="fine-tune")
    assert "line 2" in error.value.body["message"].lower(), error.value.body
    assert error.value.code is None
    for content in (b"", b"\xff\xfe\x00\n"):
        with raises(openai.BadRequestError):
            client.files.create(file=("no.jsonl", content), purpose="fine-tune")
    made = client.files.create(file=("bom.jsonl", b"\xef\xbb\xbf" + ROWS + b"\n"), purpose="fine-tune")
    assert made.id


def check_10_uploads_in_parts(given):
    content = bytes(range(256)) * 400
    done = client.uploads.upload_file_chunked(
        file=content,
        filename="parts.bin",
        bytes=len(content),
        mime_type="application/octet-stream",
        purpose="user_data",
        part_size=30_000,
        md5=hashlib.md5(content).hexdigest(),
    )
    assert (done.status, done.object) == ("completed", "upload")
    assert (done.file.bytes, done.file.filename) == (len(content), "parts.bin")
    assert client.files.content(done.file.id).read() == content

    def begin():
        return client.uploads.create(bytes=3, filename="x.bin", mime_type="text/plain", purpose="user_data")

    upload = begin()
    assert (upload.status, upload.bytes) == ("pending", 3)
    part = client.uploads.parts.create(upload.id, data=b"abc")
    assert (part.upload_id, part.object) == (upload.id, "upload.part")
    with raises(openai.BadRequestError):
        client.uploads.complete(upload.id, part_ids=[part.id], md5="0" * 32)
    upload = begin()
    part = client.uploads.parts.create(upload.id, data=b"ab")
    with raises(openai.BadRequestError):
        client.uploads.complete(upload.id, part_ids=[part.id])
    upload = begin()
    assert client.uploads.cancel(upload.id).status == "cancelled"
    with raises(openai.BadRequestError):
        client.uploads.parts.create(upload.id, data=b"abc")


def check_48_errors_of_the_door(given):
    with raises(openai.AuthenticationError) as error:
        client.with_options(api_key="sk-wrong").models.list()
    assert error.value.code == "invalid_api_key"
    with raises(openai.NotFoundError) as error:
        client.get("/no/such/route", cast_to=object)
    assert error.value.body["message"], error.value
    base = str(client.base_url).rstrip("/")
    with raises(openai.BadRequestError):
        client.post("/fine_tuning/jobs", cast_to=object, body={"model": 3})
    import urllib.error
    import urllib.request

    asked = urllib.request.Request(f"{base}/chat/completions", data=b'{"model": ', method="POST")
    asked.add_header("Authorization", f"Bearer {client.api_key}")
    asked.add_header("Content-Type", "application/json")
    with raises(urllib.error.HTTPError) as error:
        urllib.request.urlopen(asked)
    assert error.value.code == 400, error.value.code
    assert json.load(error.value)["error"]["type"] == "invalid_request_error"


run(globals())
