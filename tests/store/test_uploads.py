"""Uploads in parts: order, declared size and MD5, closing once and for all."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from typing import BinaryIO

import pytest

from luthier.spec.errors import NotFound, UserError
from luthier.store.files import Files
from luthier.store.uploads import Upload, Uploads
from tests.store.clock import START, Clock


def begin(uploads: Uploads, size: int = 11) -> Upload:
    return uploads.create(filename="big.jsonl", purpose="fine-tune", bytes=size, mime_type="text/jsonl")


def test_parts_become_a_file_in_the_named_order(uploads: Uploads, files: Files) -> None:
    upload = begin(uploads)
    assert upload == Upload(
        upload.id, 11, START, START + 3600, "big.jsonl", "fine-tune", "text/jsonl", None, "pending", None
    )
    world = uploads.add_part(upload.id, [b"wor", b"ld"])
    hello = uploads.add_part(upload.id, [b"hello "])
    assert [part.id for part in uploads.parts(upload.id)] == [world.id, hello.id]
    md5 = hashlib.md5(b"hello world").hexdigest()
    done = uploads.complete(upload.id, [hello.id, world.id], md5=md5.upper())
    assert done.status == "completed" and done.file_id is not None
    file = files.get(done.file_id)
    assert (file.filename, file.purpose, file.bytes, file.expires_at) == ("big.jsonl", "fine-tune", 11, None)
    with files.open(file.id) as handle:
        assert handle.read() == b"hello world"
    assert uploads.parts(upload.id) == []
    assert list(files.blobs.all()) == [file.sha256]


def test_completing_again_is_the_same_answer(uploads: Uploads, files: Files) -> None:
    upload = begin(uploads, 1)
    part = uploads.add_part(upload.id, [b"x"])
    first = uploads.complete(upload.id, [part.id])
    assert uploads.complete(upload.id, [part.id]) == first
    assert len(files.list().data) == 1


def test_a_part_that_is_the_whole_keeps_its_blob(uploads: Uploads, files: Files) -> None:
    upload = begin(uploads)
    part = uploads.add_part(upload.id, [b"hello world"])
    done = uploads.complete(upload.id, [part.id])
    with files.open(str(done.file_id)) as handle:
        assert handle.read() == b"hello world"


def test_the_file_gets_its_expiry(uploads: Uploads, files: Files) -> None:
    upload = uploads.create(filename="x", purpose="batch", bytes=1, mime_type="x", file_expires_after=7200)
    part = uploads.add_part(upload.id, [b"x"])
    done = uploads.complete(upload.id, [part.id])
    assert files.get(str(done.file_id)).expires_at == START + 7200


def test_what_is_not_as_declared_stays_pending(uploads: Uploads, files: Files) -> None:
    upload, other = begin(uploads), begin(uploads)
    hello, world = uploads.add_part(upload.id, [b"hello "]), uploads.add_part(upload.id, [b"world"])
    alien = uploads.add_part(other.id, [b"hello "])
    wrong = [
        ([hello.id], None, "have 6 bytes together, but 11 were declared"),
        ([], None, "have 0 bytes"),
        ([hello.id, hello.id], None, "named twice"),
        ([alien.id, world.id], None, "has no part"),
        (["part_x", "../../etc"], None, "has no part"),
        ([hello.id, world.id], "0" * 32, "md5"),
    ]
    for part_ids, md5, message in wrong:
        with pytest.raises(UserError, match=message):
            uploads.complete(upload.id, part_ids, md5=md5)
    assert uploads.get(upload.id).status == "pending"
    assert files.list().data == () and list(files.blobs.incoming.iterdir()) == []
    assert uploads.complete(upload.id, [hello.id, world.id]).status == "completed"


def test_after_an_end_nothing_is_taken(uploads: Uploads, files: Files, clock: Clock) -> None:
    cancelled, completed, expired = begin(uploads), begin(uploads, 1), begin(uploads)
    for upload in (cancelled, expired):
        uploads.add_part(upload.id, [b"parts that go"])
    uploads.complete(completed.id, [uploads.add_part(completed.id, [b"x"]).id])
    assert uploads.cancel(cancelled.id).status == "cancelled"
    assert uploads.cancel(cancelled.id).status == "cancelled"
    clock.forward(3600)
    assert uploads.get(expired.id).status == "expired"
    for upload in (cancelled, completed, expired):
        with pytest.raises(UserError, match=r"is (cancelled|completed|expired)"):
            uploads.add_part(upload.id, [b"late"])
    for upload in (completed, expired):
        with pytest.raises(UserError, match=r"is (completed|expired)"):
            uploads.cancel(upload.id)
    for upload in (cancelled, expired):
        with pytest.raises(UserError, match=r"is (cancelled|expired)"):
            uploads.complete(upload.id, [])
    assert uploads.sweep() == 1
    assert uploads.sweep() == 0
    assert uploads.get(expired.id).status == "expired"
    assert list(files.blobs.all()) == [hashlib.sha256(b"x").hexdigest()]


def test_an_upload_that_is_closed_while_a_part_arrives(uploads: Uploads, files: Files) -> None:
    upload = begin(uploads)

    def pieces() -> Iterator[bytes]:
        yield b"hello "
        uploads.cancel(upload.id)
        yield b"world"

    with pytest.raises(UserError, match="is cancelled"):
        uploads.add_part(upload.id, pieces())
    assert uploads.parts(upload.id) == [] and list(files.blobs.all()) == []


@pytest.mark.parametrize("act", ["complete", "cancel"])
def test_an_upload_that_is_closed_while_it_is_completed(
    uploads: Uploads, files: Files, monkeypatch: pytest.MonkeyPatch, act: str
) -> None:
    upload = begin(uploads)
    parts = [uploads.add_part(upload.id, [piece]).id for piece in (b"hello ", b"world")]
    opener = files.opener

    def meddle(sha256: str) -> Callable[[], BinaryIO]:
        monkeypatch.undo()
        if act == "complete":
            uploads.complete(upload.id, parts)
        else:
            uploads.cancel(upload.id)
        return opener(sha256)

    monkeypatch.setattr(files, "opener", meddle)
    if act == "complete":
        done = uploads.complete(upload.id, parts)
        assert done.status == "completed" and [file.id for file in files.list().data] == [done.file_id]
    else:
        with pytest.raises(UserError, match="is cancelled"):
            uploads.complete(upload.id, parts)
        assert files.list().data == () and list(files.blobs.all()) == []


def test_a_part_has_a_limit(uploads: Uploads) -> None:
    upload = begin(uploads)
    with pytest.raises(UserError, match="allowed 4 bytes"):
        uploads.add_part(upload.id, [b"12345"], limit=4)
    assert uploads.parts(upload.id) == []


def test_a_declared_size_is_a_size(uploads: Uploads) -> None:
    for size in (0, -1, 2**63):
        with pytest.raises(UserError, match="bytes: found"):
            begin(uploads, size)


@pytest.mark.parametrize("id", ["upload_" + "a" * 24, "../x", "upload_../../../../../etc/x"])
def test_unknown_uploads(uploads: Uploads, id: str) -> None:
    for ask in (uploads.get, uploads.parts, uploads.cancel):
        with pytest.raises(NotFound):
            ask(id)
    with pytest.raises(NotFound):
        uploads.add_part(id, [b"x"])
    with pytest.raises(NotFound):
        uploads.complete(id, [])
