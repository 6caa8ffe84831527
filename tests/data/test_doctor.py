"""The data doctor over whole files: every kind is found, counted and placed; processes and layouts change nothing."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from luthier.data import scan
from luthier.data.doctor import check
from luthier.data.findings import KINDS, Finding, Report
from luthier.data.render import Renderer
from tests import tiny as tiny_models
from tests.data.record_files import ANSWER, USER, chat

WORDS = ["alpha", "bravo", "carbon", "delta", "echo", "forest", "granite", "harbor", "island", "jungle", "kettle"]
WORDS += ["lemon", "marble", "nectar", "orchid"]


def sentence(n: int) -> str:
    """Different words for different n, enough that no two sentences are almost the same."""
    return " ".join(WORDS[(n * k + n // 7 + k * k) % len(WORDS)] + str((n * 31 + k * 17) % 97) for k in range(1, 9))


def row(n: int, answer: str | None = None, system: str | None = None) -> dict[str, Any]:
    turns = [{"role": "system", "content": system}] if system else []
    told = sentence(n + 1000) if answer is None else answer
    return chat(*turns, {"role": "user", "content": sentence(n)}, {"role": "assistant", "content": told})


def write(path: Path, rows: Sequence[Any]) -> Path:
    lines = [line if isinstance(line, str) else json.dumps(line, ensure_ascii=False) for line in rows]
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


def found(report: Report, kind: str) -> Finding:
    (finding,) = [finding for finding in report.findings if finding.kind == kind]
    return finding


def counts(report: Report) -> dict[str, int]:
    return {finding.kind: finding.count for finding in report.findings}


@pytest.fixture(scope="module")
def renderer(tmp_path_factory: pytest.TempPathFactory) -> Renderer:
    folder = tiny_models.make_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    (folder / "config.json").write_text('{"max_position_embeddings": 512}')
    return Renderer.load(folder)


def test_a_clean_file(tmp_path: Path) -> None:
    report = check([write(tmp_path / "a.jsonl", [row(n) for n in range(30)])])
    assert (report.format, report.records, report.findings, report.exit_code) == ("chat", 30, [], 0)
    numbers = report.statistics["files"][str(tmp_path / "a.jsonl")]
    assert numbers["turns"]["median"] == 2 and numbers["roles"] == {"user": 30, "assistant": 30}
    assert sum(count for _, _, count in numbers["characters"]["histogram"]) == 30


def test_broken_rows_are_errors(tmp_path: Path) -> None:
    rows = [row(0), "{", row(1), chat(USER), {"messages": []}, row(2), "[1]"]
    report = check([write(tmp_path / "a.jsonl", rows)])
    assert report.records == 7
    assert report.exit_code == 2
    assert found(report, "unreadable").rows == [2]
    assert found(report, "invalid").rows == [4, 5, 7]
    assert [problem.line for problem in report.problems] == [2, 4, 5, 7]


def test_repeats_and_contradictions(tmp_path: Path) -> None:
    rows = [row(0), row(1), row(0), row(1, "other words entirely, and so on"), row(2), row(0)]
    rows.append(chat({"role": "user", "content": sentence(2)}, {"role": "assistant", "content": sentence(1002) + "!"}))
    report = check([write(tmp_path / "a.jsonl", rows)])
    assert (found(report, "duplicate").count, found(report, "duplicate").rows) == (2, [3, 6])
    assert found(report, "duplicate").details == ["repeats row 1", "repeats row 1"]
    assert (found(report, "near_duplicate").rows, found(report, "near_duplicate").details) == ([7], ["is almost row 5"])
    contradiction = found(report, "contradiction")
    assert (contradiction.count, contradiction.rows) == (2, [2, 5])
    assert contradiction.details == ["answered differently in row 4", "answered differently in row 7"]
    assert report.exit_code == 1


def test_files_are_one_data_set(tmp_path: Path) -> None:
    one, two = write(tmp_path / "a.jsonl", [row(0), row(1)]), write(tmp_path / "b.jsonl", [row(2), row(1)])
    report = check([one, two])
    duplicate = found(report, "duplicate")
    assert (duplicate.file, duplicate.rows, duplicate.details) == (str(two), [2], ["repeats row 2 of a.jsonl"])
    assert report.records == 4


def test_validation_that_is_in_training(tmp_path: Path) -> None:
    training = write(tmp_path / "a.jsonl", [row(n) for n in range(10)])
    near = chat({"role": "user", "content": sentence(4) + "?"}, {"role": "assistant", "content": sentence(1004)})
    held = write(tmp_path / "v.jsonl", [row(50), row(3), row(5, "something else is said here"), near])
    report = check([training], validation=[held])
    overlap = found(report, "overlap")
    assert (overlap.file, overlap.rows) == (str(held), [2, 3])
    assert overlap.details == ["has the prompt of row 4 of a.jsonl", "has the prompt of row 6 of a.jsonl"]
    assert found(report, "near_overlap").rows == [4]
    assert report.records == 10
    assert set(counts(report)) == {"overlap", "near_overlap"}
    assert check([training], validation=[write(tmp_path / "w.jsonl", [row(n) for n in range(20, 30)])]).findings == []


def test_tokens(tmp_path: Path, renderer: Renderer) -> None:
    """B16: a row whose prompt fills the length is named, with what is lost; the tokens are those of training."""
    rows = [chat(USER, ANSWER) for _ in range(2)] + [chat(USER | {"content": "the fox " * 200}, ANSWER)]
    rows.append(chat(USER, ANSWER | {"content": "one two three " * 60}))
    path = write(tmp_path / "a.jsonl", rows)
    report = check([path], renderer, max_length=64)
    assert found(report, "nothing_supervised").rows == [3]
    long = found(report, "too_long")
    assert long.rows == [3, 4]
    assert report.exit_code == 2
    lengths = [len(renderer.rows(example)[0].ids) for example in _examples(path)]
    learnt = [renderer.rows(example)[0].supervised for example in _examples(path)]
    numbers = report.statistics["files"][str(path)]
    assert numbers["tokens"]["total"] == sum(lengths) and numbers["learnt_tokens"]["total"] == sum(learnt)
    assert numbers["lost_tokens"] == sum(length - 64 for length in lengths if length > 64)
    assert f"{lengths[3]:,} tokens; a cut at 64" in long.details[1]
    assert check([path], renderer).statistics["max_length"] == 512


def _examples(path: Path) -> list[Any]:
    from luthier.data.formats import read_examples

    return list(read_examples(path))


def test_control_tokens_are_the_models(tmp_path: Path, renderer: Renderer) -> None:
    path = write(tmp_path / "a.jsonl", [row(0, "<|im_end|>"), row(1, "<end_of_turn>")])
    assert found(check([path], renderer), "special_tokens").rows == [1]
    assert found(check([path]), "special_tokens").rows == [1, 2]


def test_a_template_without_tools(tmp_path: Path, renderer: Renderer) -> None:
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
    turns = (USER, {"role": "assistant", "tool_calls": [call]})
    report = check([write(tmp_path / "a.jsonl", [chat(USER, ANSWER), chat(*turns, tools=[tool])])], renderer)
    assert found(report, "unrenderable").rows == [2]
    assert found(report, "unrenderable").severity == "error"


def test_separators(tmp_path: Path) -> None:
    pairs = [{"prompt": f"{sentence(n)} ->", "completion": f" {sentence(n + 99)} END"} for n in range(8)]
    assert check([write(tmp_path / "a.jsonl", pairs)]).findings == []
    odd = [*pairs, {"prompt": sentence(50), "completion": sentence(51)}]
    report = check([write(tmp_path / "b.jsonl", odd)])
    ends, spaces = [finding for finding in report.findings if finding.kind == "separators"]
    assert (ends.rows, ends.details) == ([9], ["the others end with ' ->'"])
    assert (spaces.rows, spaces.count) == ([9], 1)
    assert found(report, "end_markers").details == ["the others end with ' END'"]
    bare = [{"prompt": sentence(n), "completion": sentence(n + 99)} for n in range(8)]
    report = check([write(tmp_path / "c.jsonl", bare)])
    assert (found(report, "separators").count, found(report, "end_markers").count) == (8, 8)
    assert found(report, "separators").details[0] == "no ending is common to most rows"


def test_classes(tmp_path: Path) -> None:
    labels = ["billing"] * 60 + ["refund"] * 35 + ["other"] * 5
    rows = [row(n, label) for n, label in enumerate(labels)]
    report = check([write(tmp_path / "a.jsonl", rows)])
    balance = found(report, "label_balance")
    assert balance.message == "3 classes, from 5 rows ('other') to 60 ('billing')"
    assert balance.details == ["'other': 5 rows"]
    numbers = report.statistics["files"][str(tmp_path / "a.jsonl")]
    assert numbers["classes"] == [["billing", 60], ["refund", 35], ["other", 5]]
    even = check([write(tmp_path / "b.jsonl", [row(n, "ab"[n % 2]) for n in range(40)])])
    assert "label_balance" not in counts(even)


def test_languages(tmp_path: Path) -> None:
    english = "It is the answer that you have asked for and it is not in the book."
    rows = [row(n, f"{english} {n}") for n in range(9)] + [row(9, "今天天气很好，我们去公园散步吧。")]
    finding = found(check([write(tmp_path / "a.jsonl", rows)]), "mixed_languages")
    assert (finding.count, finding.rows) == (1, [10])
    assert finding.details[0].startswith("answer in Chinese")


def test_systems_that_only_some_rows_have(tmp_path: Path) -> None:
    report = check([write(tmp_path / "a.jsonl", [row(0, system="Be brief."), row(1), row(2)])])
    assert found(report, "missing_system").rows == [2, 3]
    assert "missing_system" not in counts(check([write(tmp_path / "b.jsonl", [row(1), row(2)])]))


def test_outliers(tmp_path: Path) -> None:
    rows = [row(n) for n in range(20)] + [row(30, sentence(3) * 400)]
    report = check([write(tmp_path / "a.jsonl", rows)])
    assert found(report, "outlier").rows == [21]
    numbers = report.statistics["files"][str(tmp_path / "a.jsonl")]
    assert numbers["longest"][0]["row"] == numbers["oddest"][0]["row"] == 21


def test_unknown_keys_and_files_that_are_none(tmp_path: Path) -> None:
    report = check([write(tmp_path / "a.jsonl", [row(0), row(1) | {"id": 7}, row(2) | {"id": 8}])])
    assert (found(report, "unknown_key").count, found(report, "unknown_key").rows) == (2, [2])
    empty = tmp_path / "b.jsonl"
    empty.write_bytes(b"\n\n")
    report = check([empty])
    assert counts(report) == {"unreadable": 1}
    assert "blank lines" in str(report.problems[0])
    utf16 = tmp_path / "c.jsonl"
    utf16.write_bytes("\n".join(json.dumps(row(n)) for n in range(5)).encode("utf-16"))
    report = check([utf16])
    assert "UTF-16" in str(report.problems[0]) and report.exit_code == 2


def test_a_text_file(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("Once upon a time.\n" * 10, encoding="utf-8")
    report = check([path])
    assert (report.format, report.records, report.findings) == ("text", 1, [])


def same_but_paths(report: Report) -> dict[str, Any]:
    value = report.json()
    value["statistics"] = list(value["statistics"]["files"].values())
    del value["fixes"]
    for item in (*value["findings"], *value["problems"]):
        item.pop("file"), item.pop("fix", None), item.pop("line", None)
    return value


def mixed_rows() -> list[Any]:
    rows: list[Any] = [row(n, system="Be brief." if n % 3 else None) for n in range(60)]
    rows[10], rows[20], rows[59] = "{", row(5), row(3, "mail bob@firm.org, then")
    rows[30] = row(30) | {"extra": 1}
    rows[45] = {"messages": []}
    return rows


def test_spans_and_processes_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.jsonl", mixed_rows())
    whole = check([path])
    assert found(whole, "personal_data").rows == [60]
    monkeypatch.setattr(scan, "SPAN", 2_000)
    told: list[tuple[int, int]] = []
    assert check([path], processes=1, progress=lambda *at: told.append(at)).json() == whole.json()
    assert len(told) > 4 and told[-1] == (path.stat().st_size, path.stat().st_size)
    assert told == sorted(told)
    assert check([path], processes=2).json() == whole.json()


def test_processes_tokenise_alike(tmp_path: Path, renderer: Renderer, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.jsonl", mixed_rows())
    whole = check([path], renderer, max_length=80)
    monkeypatch.setattr(scan, "SPAN", 2_000)
    assert check([path], renderer, max_length=80, processes=2).json() == whole.json()


def test_layouts_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [item for item in mixed_rows() if not isinstance(item, str)]
    lines = check([write(tmp_path / "a.jsonl", rows)])
    array = tmp_path / "a.json"
    array.write_text(json.dumps(rows, indent=1, ensure_ascii=False), encoding="utf-8")
    monkeypatch.setattr(scan, "PART", 7)
    assert same_but_paths(check([array])) == same_but_paths(lines)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(picks=st.lists(st.integers(0, 6), min_size=1, max_size=12), size=st.integers(50, 900))
def test_repeats_are_counted_exactly(
    picks: list[int], size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scan, "SPAN", size)
    report = check([write(tmp_path / "a.jsonl", [row(n) for n in picks])], processes=1)
    assert report.records == len(picks)
    assert counts(report).get("duplicate", 0) == len(picks) - len(set(picks))
    assert {"contradiction", "near_duplicate"}.isdisjoint(counts(report))


def test_every_mend_is_a_command(tmp_path: Path) -> None:
    report = check([write(tmp_path / "a b.jsonl", [row(0), row(0)])])
    fixed = tmp_path / "a b.fixed.jsonl"
    assert found(report, "duplicate").fix == (
        f"luthier data fix '{tmp_path / 'a b.jsonl'}' --dedupe exact -o '{fixed}'"
    )
    assert all(kind.why and kind.title and kind.level in ("error", "warning", "note") for kind in KINDS.values())
    assert all(kind.mend in ("", f"--drop {name}") or kind.mend.startswith("--") for name, kind in KINDS.items())
