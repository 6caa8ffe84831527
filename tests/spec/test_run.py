"""The run folder: whole files, whole lines, whatever is killed when."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from luthier.spec.errors import BadData, LuthierError, NotFound, NotNow, UserError
from luthier.spec.run import RunFolder, append_line, write_whole


def test_events_survive_a_half_line(tmp_path: Path) -> None:
    """A killed writer leaves half a line: readers wait for its end, and the next event is not eaten by it."""
    run = RunFolder(tmp_path / "run").create({})
    run.emit("phase", name="load", message="é 你")
    with open(run.events_file, "ab") as handle:
        handle.write(b'{"time": 1, "type": "st')
    assert [event["type"] for _, event in run.events()] == ["phase"]
    run.emit("warning", message="later", hint="")
    seen = list(run.events())
    assert [event["type"] for _, event in seen] == ["phase", "warning"]
    assert list(run.events(seen[0][0]))[-1] == seen[-1]
    assert list(run.events(seen[-1][0])) == []


def test_events_of_many_writers_do_not_mix(tmp_path: Path) -> None:
    file = tmp_path / "lines"

    def work(name: int) -> None:
        for n in range(100):
            append_line(file, json.dumps([name, n, "x" * 500]))

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert sorted((name, n) for name, n, _ in lines) == [(name, n) for name in range(4) for n in range(100)]


def test_a_line_that_the_disk_took_a_part_of_is_said(tmp_path: Path) -> None:
    """And stays a broken line, whole lines before and after it."""
    code = f"""
import resource
from luthier.spec.run import append_line, is_full
path = {str(tmp_path / "lines")!r}
append_line(path, "1" * 40)
resource.setrlimit(resource.RLIMIT_FSIZE, (50, resource.RLIM_INFINITY))
for _ in range(2):
    try:
        append_line(path, "2" * 40)
        raise AssertionError("it was not said")
    except OSError as error:
        assert is_full(error), error
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
append_line(path, "3" * 40)
"""
    subprocess.run([sys.executable, "-c", code], check=True)
    assert (tmp_path / "lines").read_text() == f"{'1' * 40}\n{'2' * 9}\n{'3' * 40}\n"


def test_numbers_that_json_has_no_word_for_are_our_fault(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run").create({})
    with pytest.raises(ValueError, match="not JSON compliant"):
        run.emit("step", loss=float("nan"))
    with pytest.raises(AssertionError):
        run.emit("nonsense")


def _write_for_ever(path: str) -> None:
    for n in range(10**9):
        write_whole(Path(path), json.dumps([n] * 2000))


def test_a_reader_never_sees_half_a_file(tmp_path: Path) -> None:
    file = tmp_path / "whole.json"
    write_whole(file, json.dumps([0] * 2000))
    for _ in range(3):
        writer = multiprocessing.get_context("spawn").Process(target=_write_for_ever, args=(str(file),))
        writer.start()
        assert writer.pid is not None
        for _ in range(40):
            assert len(set(json.loads(file.read_text()))) == 1
            time.sleep(0.005)
        os.kill(writer.pid, signal.SIGKILL)
        writer.join()
        assert len(set(json.loads(file.read_text()))) == 1


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "f"
    write_whole(file, "old")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_whole(file, "new")
    assert file.read_text() == "old" and [path.name for path in tmp_path.iterdir()] == ["f"]


def test_one_owner_at_a_time(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run").create({})
    with run.owned(), pytest.raises(NotNow, match="Another process is working on"), RunFolder(run.path).owned():
        pass
    with run.owned():
        pass


def test_folders_that_are_not_runs_or_already_are(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="is not a run folder"):
        RunFolder.open(tmp_path)
    run = RunFolder(tmp_path / "run").create({"a": 1})
    with pytest.raises(NotNow, match=r"already holds a run.*--resume"):
        RunFolder(run.path).create({})
    assert json.loads(RunFolder.open(run.path).request.read_text()) == {"a": 1}
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(NotNow, match="cannot be written"):
        RunFolder(blocked / "run").create({})
    with pytest.raises(NotNow, match="cannot be written"):
        RunFolder(tmp_path / ("x" * 300)).create({})


def test_a_run_that_never_began_gives_its_folder_back(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run").create({"wrong": 1})
    run.emit("started", pid=1)
    with pytest.raises(NotNow, match="already holds a run"):
        RunFolder(run.path).create({})  # perhaps it is only about to begin
    run.emit("failed", status="failed", code="invalid_setting", message="no", hint="", param=None, problems=[])
    again = RunFolder(run.path).create({"right": 1})
    assert json.loads(again.request.read_text()) == {"right": 1} and list(again.events()) == []
    for type, fields in (("step", {"step": 1}), ("failed", {"status": "failed"})):
        again.emit(type, **fields)
    with pytest.raises(NotNow, match="already holds a run"):
        RunFolder(run.path).create({})


def test_errors_say_whose_fault_and_what_next() -> None:
    error = BadData("Row 3 is blank.", hint="Fill it.")
    assert isinstance(error, UserError) and str(error) == "Row 3 is blank. Fill it."
    assert error.as_dict() == {
        "code": "invalid_data",
        "param": "data",
        "message": "Row 3 is blank.",
        "hint": "Fill it.",
    }
    kinds, codes = [LuthierError], {}
    while kinds:
        kind = kinds.pop()
        codes[kind.__name__] = kind.exit_code
        kinds += kind.__subclasses__()
    assert (codes["BadSetting"], codes["NotNow"], codes["Broken"]) == (2, 75, 1)
