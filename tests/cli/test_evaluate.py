"""`luthier evaluate`: one JSON object or a table, every bad record named, an unfinished run told apart."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from luthier.engine import models
from luthier.spec.report import Report
from luthier.spec.run import RunFolder
from tests.cli.calling import Run, caller


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setenv("COLUMNS", "120")

    return caller("evaluate", capsys)


@pytest.fixture
def adapted(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A name under which `evaluate` finds the tiny model with an adapter."""
    from peft import LoraConfig, get_peft_model

    base = models.load_base(tiny, "float32")
    config = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"], init_lora_weights=False)
    tuned = get_peft_model(base, config).eval().requires_grad_(False)
    found = models.Loaded(tuned, tiny, tiny, "", True, "tuned")
    monkeypatch.setattr(models, "load_for_use", lambda *_: found)
    return "tuned"


def test_pairs_by_which_answer_is_likelier(run: Run, adapted: str, tmp_path: Path) -> None:
    """Base beside tuned, and the shares are those of the rows; shown rows cannot be pairs."""
    pairs = [{"prompt": f"say {n}", "chosen": f"yes {n}", "rejected": f"no, {n}, no"} for n in range(12)]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    code, out, _ = run(adapted, "--data", path, "--json")
    assert code == 0
    report = Report.model_validate_json(out)
    assert report.base and report.tuned and report.proof and report.proof.metric == "preference"
    assert report.tuned.loss is None and report.tuned.rows == 12
    share = sum(row.scores["tuned"] > 0 for row in report.proof.rows) / 12
    assert report.tuned.preference_accuracy == pytest.approx(share)
    code, out, _ = run(adapted, "--data", path)
    assert code == 0 and "pairs right" in out and "token accuracy" not in out
    code, _, error = run(adapted, "--data", path, "--examples-from", path)
    assert code == 2 and "pairs of answers" in error


def rows(folder: Path, count: int = 4, **more: Any) -> Path:
    path = folder / "held-out.jsonl"
    with path.open("w") as out:
        for n in range(count):
            turns = [
                {"role": "user", "content": f"the fox {n}"},
                {"role": "assistant", "content": f"the [b]dog[/b] {n}"},
            ]
            out.write(json.dumps({"messages": turns, **more}) + "\n")
    return path


def test_json_is_the_report(run: Run, adapted: str, tmp_path: Path) -> None:
    code, out, err = run(adapted, "--data", rows(tmp_path), "--json")
    assert code == 0
    assert out.count("\n") == 1
    report = Report.model_validate(json.loads(out))
    assert report.base is not None
    assert report.tuned is not None
    assert report.tuned.rows == report.base.rows == 4
    assert report.tuned.loss != report.base.loss
    assert report.tuned.exact_match == 0.0
    assert [(sample.prompt, sample.wanted) for sample in report.samples] == [
        (f"the fox {n}", f"the [b]dog[/b] {n}") for n in range(4)
    ]
    assert all(sample.base is not None and sample.tuned is not None for sample in report.samples)
    assert "Answers may have" in err


def test_the_table_has_base_beside_tuned(run: Run, adapted: str, tmp_path: Path) -> None:
    code, out, _ = run(adapted, "--data", rows(tmp_path))
    assert code == 0
    lines = [line.split() for line in out.splitlines()]
    assert ["base", "tuned"] in lines
    assert ["rows", "4", "4"] in lines
    assert ["exact", "match", "0.0%", "0.0%"] in lines
    assert sum(line[:1] == ["wanted"] for line in lines) == 4
    assert "the [b]dog[/b] 0" in out
    assert out.splitlines()[-1] == "4 of 4 answers differ from their reference."


def test_wrong_answers_are_shown_first(run: Run, adapted: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from luthier.engine import evaluate as engine
    from luthier.engine import prove

    monkeypatch.setattr(prove, "answer_of", lambda renderer, example, ids: example.messages[-1].content)
    monkeypatch.setattr(engine, "matches", lambda answer, wanted: answer == wanted and "3" not in wanted)
    monkeypatch.setattr(sys.modules["luthier.cli.evaluate"], "SHOWN_SAMPLES", 2)
    _, out, _ = run(adapted, "--data", rows(tmp_path))
    shown = [line.split()[-1] for line in out.splitlines() if line.startswith("wanted")]
    assert shown == ["3", "0"]
    assert "75.0%" in out


def test_without_the_base(run: Run, adapted: str, tmp_path: Path) -> None:
    code, out, _ = run(adapted, "--data", rows(tmp_path), "--no-base", "--json")
    report = json.loads(out)
    assert code == 0
    assert report["base"] is None
    assert [sample["base"] for sample in report["samples"]] == [None] * 4


def test_a_model_that_names_no_base_is_measured_alone(run: Run, tiny: Path, tmp_path: Path) -> None:
    code, out, err = run(tiny, "--data", rows(tmp_path), "--limit", "2", "--max-tokens", "2")
    assert code == 0
    assert "does not say which base it was tuned from" in err
    assert ["rows", "2"] in [line.split() for line in out.splitlines()]


def test_every_bad_record_is_named(run: Run, tiny: Path, tmp_path: Path) -> None:
    path = rows(tmp_path, 3)
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], "{broken", lines[1], '{"messages": []}', lines[2]]))
    code, out, err = run(tiny, "--data", path, "--json")
    assert code == 2
    problems = json.loads(out)["problems"]
    assert [problem["line"] for problem in problems] == [2, 4]
    code, out, err = run(tiny, "--data", path)
    assert (code, out) == (2, "")
    assert "2 problems" in err
    assert "line 4" in err


def test_limit_does_not_look_further(run: Run, tiny: Path, tmp_path: Path) -> None:
    path = rows(tmp_path, 2)
    path.write_text(path.read_text() + "{broken\n")
    assert run(tiny, "--data", path, "--limit", "2", "--max-tokens", "1")[0] == 0


def test_a_row_longer_than_the_context_is_named(run: Run, tiny: Path, tmp_path: Path) -> None:
    path = tmp_path / "long.jsonl"
    path.write_text(json.dumps({"prompt": "fox " * 600, "completion": "dog"}) + "\n")
    code, _, err = run(tiny, "--data", path)
    assert code == 2
    assert f"{path}: line 1" in err
    assert "at most 512" in err


def test_a_file_that_is_not_there(run: Run, tiny: Path) -> None:
    code, _, err = run(tiny, "--data", "nowhere.jsonl")
    assert code == 2
    assert "No data file nowhere.jsonl." in err


@pytest.mark.parametrize(
    ("events", "status"),
    [
        ([("phase", {"name": "train", "message": "Training"})], "it is not finished"),
        ([("stopped", {"status": "stopped", "step": 3, "resume": ""})], "it is stopped"),
        ([("failed", {"status": "failed", "message": "The disk is full."})], "it is failed (The disk is full.)"),
        ([], "it is not finished"),
    ],
)
def test_a_run_without_a_result_says_how_to_go_on(
    run: Run, tmp_path: Path, events: list[tuple[str, dict[str, Any]]], status: str
) -> None:
    folder = RunFolder(tmp_path / "my run").create({})
    for name, fields in events:
        folder.emit(name, **fields)
    code, _, err = run(folder.path, "--data", rows(tmp_path))
    assert code == 2
    assert f"has no model yet; {status}." in err
    assert "luthier train --resume" in err
    assert "my run'" in err
