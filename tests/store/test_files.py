"""Files and their contents: whole, once, counted, bounded, expired, swept; names are only data."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from luthier.spec.errors import Broken, NotFound, NotNow, UserError
from luthier.store.db import Database
from luthier.store.files import File, Files
from luthier.store.uploads import Uploads
from tests.store.clock import START, Clock

HELLO = hashlib.sha256(b"hello world").hexdigest()


def blobs(files: Files) -> list[str]:
    return list(files.blobs.all())


def create(files: Files, content: bytes = b"hello world", purpose: str = "fine-tune", name: str = "a.jsonl") -> File:
    return files.create([content], filename=name, purpose=purpose)


def test_a_file_is_what_was_sent(files: Files, database: Database) -> None:
    file = files.create(iter([b"hello ", b"", b"world"]), filename="train.jsonl", purpose="fine-tune")
    assert file == File(file.id, 11, HELLO, START, None, "train.jsonl", "fine-tune", "processed")
    assert files.get(file.id) == file
    with files.open(file.id) as handle:
        assert handle.read() == b"hello world"
    assert (database.home / "files" / HELLO[:2] / HELLO).read_bytes() == b"hello world"
    assert list((database.home / "files" / "incoming").iterdir()) == []


def test_content_is_never_whole_in_memory(files: Files) -> None:
    alive = 0

    class Piece(bytes):
        def __del__(self) -> None:
            nonlocal alive
            alive -= 1

    most = 0

    def pieces() -> Iterator[bytes]:
        nonlocal alive, most
        for _ in range(50):
            alive += 1
            most = max(most, alive)
            yield Piece(b"x" * 1000)

    assert files.create(pieces(), filename="big", purpose="fine-tune").bytes == 50_000
    assert most <= 3


def test_the_same_content_is_kept_once_until_its_last_row_goes(files: Files) -> None:
    first, second = create(files), create(files, name="b.jsonl")
    assert first.sha256 == second.sha256 and first.id != second.id
    assert blobs(files) == [HELLO]
    files.delete(first.id)
    assert blobs(files) == [HELLO]
    with files.open(second.id) as handle:
        assert handle.read() == b"hello world"
    files.delete(second.id)
    assert blobs(files) == []


def test_deleting_twice_says_so(files: Files) -> None:
    file = create(files)
    files.delete(file.id)
    for ask in (files.delete, files.get, files.open):
        with pytest.raises(NotFound, match=file.id):
            ask(file.id)


def test_a_reader_keeps_what_it_opened(files: Files) -> None:
    file = create(files)
    with files.open(file.id) as handle:
        files.delete(file.id)
        assert handle.read() == b"hello world"


def test_content_above_the_limit_leaves_nothing(files: Files) -> None:
    assert files.create([b"12345"], filename="x", purpose="fine-tune", limit=5).bytes == 5
    with pytest.raises(UserError, match="allowed 5 bytes"):
        files.create([b"123", b"456"], filename="x", purpose="fine-tune", limit=5)
    assert len(files.list().data) == 1
    assert list(files.blobs.incoming.iterdir()) == []


def test_a_sender_that_breaks_off_leaves_nothing(files: Files) -> None:
    def pieces() -> Iterator[bytes]:
        yield b"half"
        raise ConnectionResetError

    with pytest.raises(ConnectionResetError):
        files.create(pieces(), filename="x", purpose="fine-tune")
    assert files.list().data == () and blobs(files) == [] and list(files.blobs.incoming.iterdir()) == []


def test_a_disk_that_refuses_is_not_now(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("luthier.store.blobs.os.fsync", full)
    with pytest.raises(NotNow, match="No space left on device"):
        create(files)
    monkeypatch.undo()
    assert files.list().data == () and list(files.blobs.incoming.iterdir()) == []
    assert create(files).bytes == 11


@pytest.mark.parametrize("purpose", ["", "../x", "Fine Tune", "a" * 100, "x\x00y", "-"])
def test_purposes_are_words(files: Files, purpose: str) -> None:
    with pytest.raises(UserError) as caught:
        create(files, purpose=purpose)
    assert caught.value.param == "purpose"


@pytest.mark.parametrize(
    "name", ["../../evil.jsonl", "..\\evil", "/etc/x", "a\x00b", "n" * 4000, "\ud800", "", "файл 文件.jsonl", "\\u0000"]
)
def test_names_are_only_data(files: Files, database: Database, name: str, tmp_path: Path) -> None:
    before = {path for path in tmp_path.rglob("*") if database.home not in path.parents}
    file = create(files, name=name)
    assert files.get(file.id).filename == name
    assert files.list().data[0].filename == name
    assert {path for path in tmp_path.rglob("*") if database.home not in path.parents} == before
    assert [path for path in database.home.rglob("*") if path.is_file() and "luthier.db" not in path.name] == [
        database.home / "files" / HELLO[:2] / HELLO
    ]


@pytest.mark.parametrize(
    "id", ["../../../etc/passwd", "..%2f..%2fetc%2fpasswd", "file-../../../../etc/passw", "/etc/passwd", "x\x00"]
)
def test_ids_that_walk_are_not_found(files: Files, id: str) -> None:
    for ask in (files.get, files.open, files.delete):
        with pytest.raises(NotFound):
            ask(id)
    with pytest.raises(NotFound):
        files.list(after=id)
    with pytest.raises(NotFound):
        files.mark(id, "error")


def test_a_path_is_made_of_hashes_only(files: Files) -> None:
    for text in ("../../x", HELLO.upper(), HELLO + "\n", ""):
        with pytest.raises(Broken):
            files.blobs.path(text)


def test_an_expired_file_is_gone_before_and_after_the_sweep(files: Files, clock: Clock) -> None:
    kept = create(files)
    short = files.create([b"short"], filename="s", purpose="fine-tune", expires_after=3600)
    assert short.expires_at == START + 3600
    clock.forward(3599)
    assert files.get(short.id) == short and files.sweep() == 0
    clock.forward(1)
    with pytest.raises(NotFound):
        files.get(short.id)
    assert files.list().data == (kept,)
    assert files.sweep() == 2  # the row and its blob
    assert blobs(files) == [HELLO]


def test_sweep_takes_orphans_and_leaves_the_rest(files: Files, uploads: Uploads) -> None:
    create(files)
    upload = uploads.create(filename="u", purpose="fine-tune", bytes=4, mime_type="x")
    part = uploads.add_part(upload.id, [b"part"])
    orphan = files.blobs.path("ab" + "0" * 62)
    orphan.parent.mkdir(exist_ok=True)
    orphan.write_bytes(b"left by a crash")
    (files.blobs.incoming / "dead").write_bytes(b"half")
    with files.blobs.receive([b"being written"]) as living:
        assert files.sweep() == 2
        assert living.path.read_bytes() == b"being written"
    assert not orphan.exists()
    assert blobs(files) == sorted([HELLO, part.sha256], key=lambda sha256: (sha256[:2], sha256))
    assert files.sweep() == 0


def test_lists_by_purpose(files: Files) -> None:
    tuned, batch = create(files), create(files, purpose="batch")
    assert files.list(purpose="batch").data == (batch,)
    assert files.list().data == (batch, tuned)
    assert files.list(order="asc").data == (tuned, batch)


def test_status_can_be_marked(files: Files) -> None:
    file = files.create([b"x"], filename="x", purpose="fine-tune", status="uploaded")
    assert file.status == "uploaded"
    assert files.mark(file.id, "error").status == "error"
    with pytest.raises(NotFound):
        files.mark("file-" + "a" * 24, "error")


def test_a_missing_blob_is_our_fault(files: Files) -> None:
    file = create(files)
    files.blobs.drop(file.sha256)
    with pytest.raises(Broken, match="is missing"):
        files.open(file.id)


def test_creating_and_deleting_the_same_content_at_once_never_loses_it(files: Files) -> None:
    """Six threads make and delete files of one content; every file that is there has its content, always."""
    faults: list[BaseException] = []

    def work() -> None:
        try:
            for _ in range(12):
                file = create(files)
                with files.open(file.id) as handle:
                    assert handle.read() == b"hello world"
                files.delete(file.id)
        except BaseException as error:
            faults.append(error)
            raise

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert faults == []
    assert files.list().data == () and blobs(files) == []


def test_content_that_is_being_named_again_is_not_dropped(files: Files, database: Database) -> None:
    """The last row of a content goes while another row of it is on its way: the delete waits for the outcome."""
    old = create(files)
    deleting = threading.Thread(target=files.delete, args=(old.id,))
    with files.blobs.receive([b"hello world"]) as again, database.transaction() as connection:
        file = files.insert(connection, again, filename="b", purpose="fine-tune")
        deleting.start()
        deleting.join(0.5)  # without a lock it is through by then, and the blob is gone
    deleting.join()
    with files.open(file.id) as handle:
        assert handle.read() == b"hello world"
    assert files.list().data == (file,)
