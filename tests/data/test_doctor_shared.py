"""What the data doctor finds in real public files, to the row; they lie beside some checkouts and never in one."""

from __future__ import annotations

import json

import pytest

from luthier.data import cookbook
from luthier.data.doctor import check
from luthier.data.findings import Report
from tests.data.test_shared_data import shared


def counts(report: Report, *levels: str) -> dict[str, int]:
    return {found.kind: found.count for found in report.findings if not levels or found.severity in levels}


@pytest.mark.parametrize(
    ("name", "form", "records", "findings"),
    [
        ("openai/toy_chat_fine_tuning.jsonl", "chat", 5, {}),
        ("openai/drone_training.jsonl", "chat", 103, {}),
        ("self_llm_huanhuan/huanhuan.json", "alpaca", 3729, {"duplicate": 112, "contradiction": 50}),
        (
            "llama_factory/alpaca_en_demo.json",
            "alpaca",
            999,
            {"duplicate": 14, "secret": 1, "personal_data": 1},
        ),
        ("llama_factory/alpaca_zh_demo.json", "alpaca", 1000, {"duplicate": 8}),
        ("llama_factory/identity.json", "alpaca", 91, {"contradiction": 2, "near_duplicate": 1}),
        (
            "llama_factory/glaive_toolcall_en_demo.json",
            "sharegpt",
            299,
            {
                "duplicate": 35,
                "near_duplicate": 13,
                "contradiction": 1,
                "tool_arguments": 1,
                "secret": 9,
                "personal_data": 6,
            },
        ),
        (
            "llama_factory/glaive_toolcall_zh_demo.json",
            "sharegpt",
            150,
            {"duplicate": 14, "near_duplicate": 1, "tool_arguments": 3, "secret": 10, "personal_data": 3},
        ),
        ("llama_factory/c4_demo.jsonl", "text", 150, {"mixed_encodings": 3, "personal_data": 8}),
        ("llama_factory/wiki_demo.txt", "text", 13, {}),
        ("medicalgpt/medical_sft_1K_format.jsonl", "sharegpt", 500, {}),
        ("mlx_wikisql/train.jsonl", "text", 1000, {"duplicate": 1, "near_duplicate": 28}),
        ("tinyshakespeare/input.txt", "text", 18, {}),
    ],
)
def test_what_was_found(name: str, form: str, records: int, findings: dict[str, int]) -> None:
    report = check([shared(name)])
    assert (report.format, report.records) == (form, records)
    assert counts(report, "error", "warning") == findings


def test_repeats_are_those_that_counting_by_hand_finds() -> None:
    rows = json.loads(shared("self_llm_huanhuan/huanhuan.json").read_text("utf-8"))
    pairs = [(row["instruction"], row["input"], row["output"]) for row in rows]
    report = check([shared("self_llm_huanhuan/huanhuan.json")])
    (duplicate,) = [found for found in report.findings if found.kind == "duplicate"]
    again = [n + 1 for n, pair in enumerate(pairs) if pair in pairs[:n]]
    assert (duplicate.count, duplicate.rows) == (len(again), again[:20])
    answers: dict[str, set[str]] = {}
    for row in rows:
        answers.setdefault(row["instruction"] + row["input"], set()).add(row["output"])
    assert counts(report)["contradiction"] == sum(len(said) > 1 for said in answers.values())


def test_the_three_traps_of_the_toy_file() -> None:
    path = shared("openai/toy_chat_fine_tuning.jsonl")
    report = check([path])
    rows = {found.kind: found.rows for found in report.findings}
    assert rows == {"missing_user": [4], "missing_system": [3], "outlier": [5]}
    assert report.exit_code == 0
    numbers = report.statistics["files"][str(path)]
    assert numbers["longest"][0] == {"row": 5, "characters": 26_077}
    # What the cookbook's own notebook prints about this file.
    told = dict.fromkeys(cookbook.COUNTERS, 0) | {"missing_system": 1, "missing_user": 1, "epochs": 20}
    assert numbers["cookbook"] == told
    turns = numbers["turns"]
    assert (turns["min"], turns["max"], turns["mean"], turns["total"]) == (2, 9, 3.8, 19)


def test_the_drone_file_trips_the_cookbook_and_not_us() -> None:
    """It has tools, which the cookbook's check does not know; and in this revision nothing is encoded twice."""
    path = shared("openai/drone_training.jsonl")
    report = check([path])
    assert counts(report, "error", "warning") == {}
    told = report.statistics["files"][str(path)]["cookbook"]
    assert (told["message_missing_key"], told["message_unrecognized_key"], told["missing_content"]) == (103, 103, 103)
    assert told["data_type"] == told["missing_messages_list"] == told["example_missing_assistant_message"] == 0


@pytest.mark.parametrize(
    ("name", "kind", "count"),
    [
        ("openai/labelled_transactions.csv", "unreadable", 1),
        ("rt_polarity/rt-polarity.pos", "unreadable", 1),
        ("waimai_10k/waimai_10k.csv", "unreadable", 1),
        ("gsm8k/test.jsonl", "invalid", 1319),
        ("moss_plugins/mix.jsonl", "invalid", 50),
        ("sgd_dialogues/test_dialogues_011.json", "invalid", 26),
        ("firefly/dummy_data.jsonl", "invalid", 33),
    ],
)
def test_files_that_want_converting(name: str, kind: str, count: int) -> None:
    report = check([shared(name)])
    assert counts(report, "error") == {kind: count}
    assert report.exit_code == 2


def test_a_file_beside_its_own_part() -> None:
    """The tutorial's small file is the beginning of its large one: all of it leaks."""
    small = shared("self_llm_huanhuan/huanhuan-100.json")
    report = check([shared("self_llm_huanhuan/huanhuan.json")], validation=[small])
    rows = len(json.loads(small.read_text("utf-8")))
    assert {found.kind: found.count for found in report.findings if "overlap" in found.kind} == {"overlap": rows}


def test_the_sets_of_wikisql_are_apart() -> None:
    training, held = shared("mlx_wikisql/train.jsonl"), shared("mlx_wikisql/valid.jsonl")
    assert counts(check([training], validation=[held])).get("overlap", 0) == 0
