"""Which files pass, which fail a job, and in which words."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from luthier.work import validate
from luthier.work.validate import Refusal, check_files, unread
from tests.engine.runs import chats
from tests.work.ask import jsonl, pairs, preferences
from tests.work.conftest import Bench

ASKED, ANSWER = [{"role": "user", "content": "a"}], [{"role": "assistant", "content": "b"}]


def refuse(
    tmp_path: Path, training: Any, validation: Any = None, kind: str = "modern", method: str = "supervised"
) -> Any:
    paths = []
    for name, records in (("training", training), ("validation", validation)):
        path = tmp_path / f"{name}.jsonl"
        if records is not None:
            path.write_bytes(records if isinstance(records, bytes) else jsonl(records))
        paths.append(path)
    return check_files(paths[0], None if validation is None else paths[1], kind, method)


def changed(count: int, row: int, change: Callable[[dict[str, Any]], object]) -> list[dict[str, Any]]:
    records = chats(count)
    change(records[row - 1])
    return records


@pytest.mark.parametrize(
    ("training", "validation", "kind", "method"),
    [
        (chats(10), None, "modern", "supervised"),
        (pairs(10), chats(1), "modern", "supervised"),
        (pairs(1), pairs(1), "legacy", "supervised"),
        (changed(10, 3, lambda row: row.update(note="kept apart")), None, "modern", "supervised"),
        (b"\xef\xbb\xbf" + jsonl(chats(10)), None, "modern", "supervised"),
        (preferences(10), preferences(1, "completion"), "modern", "dpo"),
        (preferences(10, "completion"), None, "modern", "dpo"),
        (jsonl(preferences(10)).rstrip(b"\n"), preferences(1), "modern", "dpo"),
        ([{"prompt": f"a {n}", "chosen": "b", "rejected": "c"} for n in range(10)], None, "modern", "dpo"),
    ],
)
def test_good_files_pass(tmp_path: Path, training: Any, validation: Any, kind: str, method: str) -> None:
    assert refuse(tmp_path, training, validation, kind, method) is None


@pytest.mark.parametrize(("records", "method"), [(chats(9), "supervised"), (preferences(9), "dpo")])
def test_too_few_examples(tmp_path: Path, records: Any, method: str) -> None:
    message = "Training file has 9 example(s), but must have at least 10 examples"
    assert refuse(tmp_path, records, method=method) == Refusal("invalid_n_examples", message, "training_file")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda row: row["messages"][0].pop("role"), "Example 11, message 1, messages[0].role: found"),
        (lambda row: row["messages"][1].update(weight=2), "Example 11, message 2, messages[1].weight: found 2"),
        (lambda row: row["messages"][0].update(weight=1), "Example 11, message 1, messages[0].weight: found"),
        (lambda row: row["messages"].pop(), "Example 11, messages: found"),
        (lambda row: row.pop("messages"), "Example 11: found"),
    ],
)
def test_a_bad_row_is_named(tmp_path: Path, change: Callable[[dict[str, Any]], object], words: str) -> None:
    refusal = refuse(tmp_path, changed(12, 11, change))
    assert (refusal.code, refusal.param) == ("invalid_training_file", "training_file")
    opening = "The job failed due to an invalid training file. Invalid file format. "
    assert refusal.message.startswith(opening + words), refusal.message


def test_only_the_first_problems_are_named(tmp_path: Path) -> None:
    refusal = refuse(tmp_path, chats(1) + [{"messages": "no list"}] * 6)
    assert [f"Example {n}," in refusal.message for n in (2, 3, 4, 5)] == [True, True, True, False]
    assert refusal.message.endswith("There are 3 more problems.")


@pytest.mark.parametrize(
    ("records", "kind", "method", "words"),
    [
        (
            preferences(10),
            "modern",
            "supervised",
            "is in the fine-tune-preference format, but the method is supervised, which needs the fine-tune-chat or",
        ),
        (preferences(10), "legacy", "supervised", "is in the fine-tune-preference format, but fine-tunes need"),
        (
            chats(10),
            "modern",
            "dpo",
            "is in the fine-tune-chat format, but the method is dpo, which needs the fine-tune-preference format.",
        ),
        (pairs(10), "modern", "dpo", "is in the fine-tune-completion format, but the method is dpo"),
        ([{"text": "a"}] * 10, "modern", "dpo", "expected input with preferred_output and non_preferred_output."),
        (preferences(10) + chats(1), "modern", "dpo", "Example 11: found a chat record, wanted a preference record"),
        (
            [*preferences(10), {**preferences(1)[0], "preferred_output": ANSWER + ASKED}],
            "modern",
            "dpo",
            "Example 11, preferred_output[1].role: found",
        ),
        (
            [{name: value for name, value in preferences(1)[0].items() if name != "non_preferred_output"}],
            "modern",
            "dpo",
            "Example 1, non_preferred_output: found no such key",
        ),
        ([{"messages": [], "label": True}], "modern", "dpo", "Example 1, label: found true, wanted two answers"),
        (chats(10), "legacy", "supervised", "is in the fine-tune-chat format, but fine-tunes need"),
        ([{"text": "a"}] * 10, "modern", "supervised", "expected either prompt/completion pairs or chat messages."),
        ([{"text": "a"}] * 10, "legacy", "supervised", "expected prompt/completion pairs."),
        (
            [{**pairs(1)[0], "more": 1}],
            "legacy",
            "supervised",
            "found the key 'more' in 1 record, wanted only completion, prompt.",
        ),
        (b"", "modern", "supervised", "found no bytes at all"),
        (b'{"messages": [', "modern", "supervised", "Example 1"),
        ("ü".encode("latin-1"), "legacy", "supervised", "Example 1: found byte 0xFC"),
    ],
)
def test_a_wrong_format_is_named(tmp_path: Path, records: Any, kind: str, method: str, words: str) -> None:
    refusal = refuse(tmp_path, records, None, kind, method)
    assert (refusal.code, refusal.param) == ("invalid_training_file", "training_file")
    assert words in refusal.message, refusal.message


def test_the_validation_file_has_errors_of_its_own(tmp_path: Path) -> None:
    refusal = refuse(tmp_path, chats(10), [{"messages": []}])
    assert (refusal.code, refusal.param) == ("invalid_validation_file", "validation_file")
    assert refusal.message.startswith(
        "The job failed due to an invalid validation file. Invalid file format. Example 1"
    )


def test_a_validation_file_of_chats_is_no_match_for_dpo(tmp_path: Path) -> None:
    refusal = refuse(tmp_path, preferences(10), chats(2), method="dpo")
    assert (refusal.code, refusal.param) == ("invalid_validation_file", "validation_file")
    assert "is in the fine-tune-chat format, but the method is dpo" in refusal.message


def test_a_file_that_is_gone(tmp_path: Path) -> None:
    gone = check_files(tmp_path / "no.jsonl", None, "modern", "supervised")
    assert gone is not None and gone.message.endswith("The file has been deleted.")


def test_the_reader_is_bounded(tmp_path: Path) -> None:
    """A record that needs more memory than a reader may have ends the reader's work, and is told."""
    file = tmp_path / "training.jsonl"
    file.write_bytes(b'{"messages": [' + b"[]," * 9_000_000 + b"[]]}\n")
    code = (
        "import sys, json; from luthier.work import validate; validate.MEMORY = 400 << 20; "
        "validate._main(json.load(sys.stdin))"
    )
    asked = f'{{"training": "{file}", "validation": null, "kind": "modern", "method": "supervised"}}'
    done = subprocess.run([sys.executable, "-c", code], input=asked, text=True, capture_output=True, env=os.environ)
    refusal = unread(done.returncode, done.stderr) if done.returncode else validate.verdict_of(done.stdout)
    assert refusal is not None and "memory" in refusal.message


def test_a_reader_that_died_is_the_files_fault() -> None:
    assert "more than 2 GiB of memory" in unread(-9, "").message
    assert unread(1, "Traceback").message.endswith("Its reader ended with exit code 1.")


def test_jobs_fail_or_queue_by_their_files(bench: Bench) -> None:
    good = bench.submit()
    few = bench.submit(chats(5))
    torn = bench.submit(changed(12, 11, lambda row: row["messages"][0].pop("role")))
    held_out = bench.submit(validation=b"[1]")
    cancelled = bench.submit()
    bench.jobs.request_cancel(cancelled.id)
    worker = bench.worker()
    while worker.once("validate", bench.stop):
        pass
    found = [bench.jobs.get(job.id) for job in (good, few, torn, held_out, cancelled)]
    assert [job.status for job in found] == ["queued", "failed", "failed", "failed", "cancelled"]
    codes = [job.error and job.error["code"] for job in found]
    assert codes == [None, "invalid_n_examples", "invalid_training_file", "invalid_validation_file", None]
    last = bench.events(few)[-1]
    assert (last.level, last.message) == ("error", (found[1].error or {})["message"])
