"""The learning curve: the metric of each published checkpoint, asked again here by hand; the best one named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from luthier.data.formats import read_examples
from luthier.data.render import Renderer
from luthier.engine import generate, learning, models
from luthier.engine.answers import answer_of
from luthier.proof.significance import wilson
from luthier.spec.data import Completion
from luthier.spec.learning import LearningPoint
from luthier.spec.proof import Interval
from luthier.spec.report import Report
from tests.engine.runs import events, train, write


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LUTHIER_HOME", str(tmp_path / "home"))


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = [{"prompt": f"is {n} odd? ->", "completion": (" yes", " no")[1 - n % 2]} for n in range(40)]
    return write(tmp_path_factory.mktemp("pairs") / "pairs.jsonl", rows)


def test_each_published_checkpoint_is_asked(
    tmp_path: Path, tiny: Path, pairs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(learning, "SHARE", 1e6)  # tiny models train faster than they load
    options: dict[str, Any] = {"epochs": 3, "validation": "0.3", "proof_rows": 4, "precision": "float32"}
    run = train(tmp_path / "run", tiny, pairs, publish_checkpoints=3, forgetting="off", **options)
    report = Report.model_validate_json(run.report.read_text())
    curve = report.learning
    assert curve is not None and curve.metric == "classification"
    losses = {event["step"]: event["loss"] for event in events(run, "validation")}
    published = sorted(int(folder.name.removeprefix("step-")) for folder in run.published.iterdir())
    assert [point.step for point in curve.points] == published and len(published) == 3
    assert len(curve.rows) == 12 and curve.chosen.startswith("Measured on 12 of 12 validation rows")
    examples = [one for one in read_examples(pairs) if isinstance(one, Completion) and one.row in curve.rows]
    renderer = Renderer.load(run.model)
    most = max(len(renderer.tokenizer.plain(one.completion)) for one in examples) + 16
    for point in curve.points:
        loaded = models.load_for_use(str(run.published / f"step-{point.step:08d}"), "float32")
        right = []
        for example in examples:
            ids = renderer.completion_prompt(example.prompt)
            rules = generate.Sampling(max_tokens=most)
            done = generate.generate(loaded.model, [ids], renderer.stop_ids, 0, rules, context=512)[0]
            said = answer_of(renderer, example, done.ids).strip().casefold().splitlines() or [""]
            words = [word.strip(".,!?") for word in said[0].split()]
            named = {label for label in ("yes", "no") if label in words}
            right.append(float(named == {example.completion.strip()}))
        assert point.scores == right
        assert point.score == pytest.approx(sum(right) / 12)
        assert (point.interval.low, point.interval.high) == pytest.approx(wilson(int(sum(right)), 12))
        assert point.validation_loss == losses[point.step]
    top = max(point.score for point in curve.points)
    equals = [point for point in curve.points if point.score == top]
    assert curve.best == min(equals, key=lambda point: point.validation_loss or 0).step
    assert "curve" in [part.name for part in report.parts]
    html = run.page.read_text()
    assert "Classification by checkpoint" in html and curve.sentence.split(" (")[0] in html
    assert json.loads(run.report.read_text())["forecast"]["curve_seconds"] > 0


def test_without_time_or_checkpoints_there_is_no_curve(tmp_path: Path, tiny: Path, pairs: Path) -> None:
    one = train(tmp_path / "one", tiny, pairs, epochs=1, validation="0.3", proof_rows=2, forgetting="off")
    assert Report.model_validate_json(one.report.read_text()).learning is None


def test_how_many_rows_are_worth_their_time() -> None:
    """Three points, a row half a second, loading two: a twelfth of the training."""

    def worth(seconds: float, held_out: int = 500) -> int:
        return learning.rows_worth(3, seconds, 2.0, 0.5, held_out)

    assert [worth(36 * seconds) for seconds in (2.0, 5.9, 6.0, 12.0, 1000.0)] == [0, 0, 8, 20, learning.MOST_ROWS]
    assert (worth(36 * 4.0, 3), worth(36 * 3.4, 3)) == (3, 0)


def test_of_equals_the_one_of_the_lower_loss_is_best() -> None:
    def point(step: int, score: float, loss: float | None) -> LearningPoint:
        interval = Interval(low=0, high=1, method="")
        return LearningPoint(step=step, score=score, interval=interval, scores=[score], validation_loss=loss)

    assert learning._best([point(1, 0.5, 1.0), point(2, 0.5, 0.9), point(3, 0.4, 0.1)]) == 2
    assert learning._best([point(1, 0.5, None), point(2, 0.5, None)]) == 1
