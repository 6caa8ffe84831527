"""`luthier report`: the table, the page and JSON of a real run; what a run without a report is told."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from luthier.proof.forgetting import compare
from luthier.proof.probe import Item
from luthier.proof.significance import wilson
from luthier.spec.gate import judge
from luthier.spec.learning import Learning, LearningPoint
from luthier.spec.proof import Interval
from luthier.spec.report import Report
from luthier.spec.run import RunFolder
from tests.cli.calling import Run, caller
from tests.engine.runs import lay_out, train, write


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setenv("COLUMNS", "120")

    return caller("report", capsys)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny: Path) -> RunFolder:
    folder = tmp_path_factory.mktemp("report")
    rows = [{"prompt": f"is {n} odd? <b>", "completion": (" yes", " no")[n % 2]} for n in range(30)]
    data = write(folder / "data.jsonl", rows)
    return train(folder / "run", tiny, data, epochs=1, validation="0.3", proof_rows=9)


def test_the_table_has_the_three_ways_and_the_verdict(run: Run, finished: RunFolder) -> None:
    code, out, _ = run(finished.path)
    assert code == 0
    lines = [line.split() for line in out.splitlines()]
    assert ["base", "base", "+", "examples", "tuned"] in lines
    assert "rows)." in out
    proof = Report.model_validate_json(finished.report.read_text()).proof
    assert proof is not None
    assert ["passed", *" ".join(f"{way.passed} of 9" for way in proof.ways).split()] in lines
    assert proof.sentence in out


def test_json_is_the_whole_report(run: Run, finished: RunFolder) -> None:
    code, out, _ = run(finished.path, "--json")
    assert code == 0
    assert json.loads(out) == json.loads(finished.report.read_text())
    assert len(json.loads(out)["proof"]["rows"]) == 9


def test_the_page_is_written_anew_and_escaped(run: Run, finished: RunFolder) -> None:
    before = finished.page.read_text()
    finished.page.unlink()
    code, out, _ = run(finished.path, "--html")
    assert (code, out.strip()) == (0, str(finished.page))
    assert finished.page.read_text() == before
    assert "odd? <b>" not in before
    assert "odd? &lt;b&gt;" in before


def test_what_cannot_be_shown_is_told(run: Run, tmp_path: Path, tiny: Path, finished: RunFolder) -> None:
    code, _, err = run(tmp_path)
    assert code == 2 and "is not a run folder" in err
    data = write(tmp_path / "d.jsonl", [{"prompt": "a", "completion": "b"}])
    begun = lay_out(tmp_path / "begun", tiny, data)
    code, _, err = run(begun.path)
    assert code == 2 and "has no report yet" in err and "--resume" in err
    begun.report.write_text("{")
    code, _, err = run(begun.path)
    assert code == 1 and "cannot be read" in err
    code, out, _ = run(finished.path, "--json", "--html")
    assert code == 2 and "one of the two" in out


def test_the_learning_curve_names_the_best(run: Run, tmp_path: Path, finished: RunFolder) -> None:
    shown = RunFolder(tmp_path / "run").create(json.loads(finished.request.read_text()))
    report = Report.model_validate_json(finished.report.read_text())
    points = []
    for step, passed in ((2, 7), (4, 9), (6, 8)):
        low, high = wilson(passed, 10)
        scores = [float(n < passed) for n in range(10)]
        ends = Interval(low=low, high=high, method="Wilson score interval")
        points.append(
            LearningPoint(step=step, score=passed / 10, interval=ends, scores=scores, validation_loss=1 / step)
        )
    chosen = "Measured on 10 of 40 validation rows, the same ones at each checkpoint."
    rows = list(range(1, 11))
    report.learning = Learning(metric="exact_match", rows=rows, chosen=chosen, points=points, best=4)
    shown.report.write_text(report.model_dump_json())
    code, out, _ = run(shown.path)
    assert code == 0
    assert "step      4  exact_match 0.900 (0.596 to 0.982)  validation loss 0.2500  best" in out.splitlines()
    assert out.count("  best\n") == 1
    said = " ".join(out.split())
    assert f"Best: step 4, exact_match 0.900 (95%: 0.596 to 0.982). {chosen}" in said
    assert "The result, step 6 with 0.800, lies within that interval." in said


def test_what_was_forgotten_and_the_gate_are_shown(run: Run, tmp_path: Path, finished: RunFolder) -> None:
    shown = RunFolder(tmp_path / "run").create(json.loads(finished.request.read_text()))
    items = [Item(f"c{n}", "knowledge", "en", pairs=(("a", " b"), ("a", " c"))) for n in range(20)]
    before, after = ({item.id: float(n >= lost) for n, item in enumerate(items)} for lost in (0, 5))
    report = Report.model_validate_json(finished.report.read_text())
    report.forgetting = compare(items, before, after, "base-x")
    report.gate = judge(None, 0.1, None, report.forgetting)
    shown.report.write_text(report.model_dump_json())
    code, out, _ = run(shown.path)
    assert code == 0
    assert re.search(r"knowledge \(en\) +20 +100\.0% +75\.0% +\+25\.0% +\+[\d.]+% to \+[\d.]+%", out)
    assert "closed: It lost 25.0% of general ability, more than 10.0%." in " ".join(out.split())
    assert report.forgetting.verdict in out
