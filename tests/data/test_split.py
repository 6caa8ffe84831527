"""Splitting a file: no prompt on both sides, nothing lost, classes keep their shares, the same every time."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from luthier.data.rows import Row, normal, parts, read_rows
from luthier.data.split import SplitDone, choose, split_file
from luthier.spec.errors import BadData, BadSetting, NotFound
from tests.data.test_shared_data import shared


def pair(prompt: str, completion: str) -> dict[str, str]:
    return {"prompt": prompt, "completion": completion}


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def splitted(source: Path, folder: Path, share: float = 0.1, **options: Any) -> tuple[SplitDone, bytes, bytes]:
    train, validation = folder / "t.out", folder / "v.out"
    done = split_file(source, train, validation, share=share, force=True, **options)
    return done, train.read_bytes(), validation.read_bytes()


def prompts(path: Path) -> set[str]:
    return {normal(parts(row.meaning)[0]) for row in read_rows(path) if isinstance(row, Row) and row.meaning}


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=60)
@given(
    rows=st.lists(
        st.tuples(st.sampled_from(["a", "A", " a ", "b", "c", "d", "e", "f"]), st.sampled_from(["1", "2", "3"])),
        min_size=2,
        max_size=40,
    ),
    share=st.floats(0.01, 0.99),
    seed=st.integers(-5, 2**40),
)
def test_every_row_is_on_one_side_and_every_prompt_too(
    tmp_path: Path, rows: list[tuple[str, str]], share: float, seed: int
) -> None:
    source = write(tmp_path / "rows.jsonl", [pair(*row) for row in rows])
    if len({prompt.strip().lower() for prompt, _ in rows}) < 2:
        with pytest.raises(BadData, match="distinct prompt"):
            splitted(source, tmp_path, share, seed=seed)
        return
    done, train, validation = splitted(source, tmp_path, share, seed=seed)
    lines = train.splitlines() + validation.splitlines()
    assert Counter(lines) == Counter(source.read_bytes().splitlines())
    assert (done.train.rows, done.validation.rows) == (len(train.splitlines()), len(validation.splitlines()))
    assert done.train.rows >= 1 and done.validation.rows >= 1
    sides = [{json.loads(line)["prompt"].strip().lower() for line in part.splitlines()} for part in (train, validation)]
    assert sides[0] & sides[1] == set()
    assert splitted(source, tmp_path, share, seed=seed) == (done, train, validation)
    for part in (train, validation):  # the order of the file
        positions = iter(source.read_bytes().splitlines())
        assert all(line in positions for line in part.splitlines())


@given(counts=st.lists(st.integers(1, 30), min_size=2, max_size=6), seed=st.integers(0, 99))
def test_prompts_of_one_row_meet_the_share_exactly(counts: list[int], seed: int) -> None:
    labels = [str(n) for n, count in enumerate(counts) for _ in range(count)]
    keys = [str(n).encode() for n in range(len(labels))]
    held = choose(keys, [1] * len(keys), labels, 0.25, seed)
    assert len(held) == max(1, round(len(keys) / 4))
    for label, count in Counter(labels).items():
        mine = sum(labels[n] == label for n in held)
        assert abs(mine - count / 4) < 1 or len(keys) < 4


def test_order_of_the_file_does_not_matter(tmp_path: Path) -> None:
    rows = [pair(f"p{n}", f"long answer {n}") for n in range(50)]
    forwards = splitted(write(tmp_path / "a.jsonl", rows), tmp_path, 0.2)
    backwards = splitted(write(tmp_path / "b.jsonl", rows[::-1]), tmp_path, 0.2)
    assert sorted(forwards[2].splitlines()) == sorted(backwards[2].splitlines())
    assert forwards[0].validation.rows == 10 and not forwards[0].stratified
    assert splitted(tmp_path / "a.jsonl", tmp_path, 0.2, seed=1)[2] != forwards[2]


def test_classes_keep_their_shares(tmp_path: Path) -> None:
    rows = [pair(f"p{n}", " yes" if n % 4 else " no") for n in range(200)]
    source = write(tmp_path / "rows.jsonl", rows)
    done, *_ = splitted(source, tmp_path)
    assert done.stratified and done.classes == {"no": (45, 5), "yes": (135, 15)}
    assert splitted(source, tmp_path, stratify="label")[0] == done
    plain = splitted(source, tmp_path, stratify="none")[0]
    assert not plain.stratified and plain.classes == {} and plain.validation.rows == 20


def test_no_classes_where_they_are_asked_for(tmp_path: Path) -> None:
    source = write(tmp_path / "rows.jsonl", [pair(f"p{n}", f"answer {n}") for n in range(30)])
    with pytest.raises(BadData, match="30 different ones in 30 rows"):
        splitted(source, tmp_path, stratify="label")
    assert not (tmp_path / "t.out").exists()


def test_an_array_stays_one_with_its_elements_bytes(tmp_path: Path) -> None:
    source = tmp_path / "rows.json"
    elements = ['{"prompt":  "a",\n "completion": "\\u0031"}', '{"prompt": "b", "completion": "2"}']
    source.write_text("[" + ",\n".join(elements) + "]")
    _, train, validation = splitted(source, tmp_path, 0.5)
    assert sorted([train.decode(), validation.decode()]) == sorted(f"[\n{element}\n]\n" for element in elements)
    assert len(json.loads(train)) == len(json.loads(validation)) == 1


def test_pretty_printed_objects_become_lines(tmp_path: Path) -> None:
    source = tmp_path / "rows.json"
    source.write_text("\n".join(json.dumps(pair(each, "x"), indent=1) for each in "ab"))
    _, train, validation = splitted(source, tmp_path, 0.5)
    assert sorted(json.loads(part)["prompt"] for part in (train, validation)) == ["a", "b"]
    assert train.count(b"\n") == 1


def test_carriage_returns_stay(tmp_path: Path) -> None:
    source = tmp_path / "rows.jsonl"
    source.write_bytes(b"".join(json.dumps(pair(each, "x")).encode() + b"\r\n" for each in "ab"))
    _, train, validation = splitted(source, tmp_path, 0.5)
    assert train.endswith(b"\r\n") and validation.endswith(b"\r\n")


def test_preferences_are_grouped_by_their_prompt(tmp_path: Path) -> None:
    def row(asked: str, good: str) -> dict[str, Any]:
        answers = [[{"role": "assistant", "content": text}] for text in (good, "bad")]
        return {
            "input": {"messages": [{"role": "user", "content": asked}]},
            "preferred_output": answers[0],
            "non_preferred_output": answers[1],
        }

    rows = [row(asked, good) for asked in "abcd" for good in "123"]
    done, train, validation = splitted(write(tmp_path / "rows.jsonl", rows), tmp_path, 0.25)
    assert (done.train.prompts, done.validation.prompts) == (3, 1)
    assert (len(train.splitlines()), len(validation.splitlines())) == (9, 3)


@pytest.mark.parametrize("share", [0.0, 1.0, -1.0, float("nan")])
def test_a_share_is_between_nothing_and_all(tmp_path: Path, share: float) -> None:
    source = write(tmp_path / "rows.jsonl", [pair("a", "1"), pair("b", "2")])
    with pytest.raises(BadSetting, match="between 0 and 1") as refusal:
        splitted(source, tmp_path, share)
    assert refusal.value.param == "share"


def test_broken_rows_are_named_and_nothing_is_written(tmp_path: Path) -> None:
    source = tmp_path / "rows.jsonl"
    source.write_text('{"prompt": "a", "completion": "1"}\n{"prompt": "b"\n{"prompt": "c", "completion": 3}\n')
    with pytest.raises(BadData, match="2 problems, so it was not split") as refusal:
        splitted(source, tmp_path, 0.5)
    assert [(problem.line, problem.field) for problem in refusal.value.problems] == [(2, ""), (3, "completion")]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rows.jsonl"]


def test_plain_text_has_no_rows(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(BadData, match="one document"):
        splitted(tmp_path / "a.txt", tmp_path)
    with pytest.raises(NotFound):
        splitted(tmp_path / "none.jsonl", tmp_path)


@pytest.mark.parametrize(
    ("name", "rows", "held"),
    [
        ("self_llm_huanhuan/huanhuan.json", 3729, 373),
        ("llama_factory/alpaca_en_demo.json", 999, 100),
        ("llama_factory/dpo_en_demo.json", 99, 10),
        ("llama_factory/dpo_zh_demo.json", 150, 15),
        ("medicalgpt/dpo_zh_500.jsonl", 166, 17),
        ("medicalgpt/toolcall_dpo_zh_demo.jsonl", 11, 1),
        ("openai/drone_training.jsonl", 103, 10),
        ("openai/toy_chat_fine_tuning.jsonl", 5, 1),
        ("mlx_wikisql/train.jsonl", 1000, 100),
    ],
)
def test_real_files(tmp_path: Path, name: str, rows: int, held: int) -> None:
    done, *_ = splitted(shared(name), tmp_path)
    assert (done.train.rows + done.validation.rows, done.validation.rows) == (rows, held)
    sides = [prompts(tmp_path / part) for part in ("t.out", "v.out")]
    if "wikisql" not in name:
        assert sides[0] & sides[1] == set()
