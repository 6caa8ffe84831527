"""A part of a run: measured where it was left, gone on to the weights of a run that was never left."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path

import pytest
import torch

from luthier.engine import checkpoint
from luthier.engine.__main__ import carry_out, main
from luthier.engine.rung import Part
from luthier.spec.run import RunFolder
from tests.engine.runs import chats, events, lay_out, refused, train, weights, write

OPTIONS = {"max_steps": 7, "precision": "float32", "dropout": 0.1, "metric": "exact_match"}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """Rows to train on, to decide by, to prove with."""
    folder = tmp_path_factory.mktemp("data")
    return (
        write(folder / "train.jsonl", chats(12)),
        write(folder / "decide.jsonl", chats(4, 100)),
        write(folder / "proof.jsonl", [*chats(3, 200), *chats(1)]),
    )


def started(out: Path, tiny: Path, files: tuple[Path, Path, Path], **options: object) -> RunFolder:
    given = {**OPTIONS, "validation": str(files[1]), "proof_data": str(files[2]), **options}
    return lay_out(out, tiny, files[0], **given)


def same(left: RunFolder, right: RunFolder) -> bool:
    mine, other = weights(left), weights(right)
    return mine.keys() == other.keys() and all(torch.equal(mine[name], other[name]) for name in mine)


def test_a_share_is_whole_steps_and_at_least_one() -> None:
    shares = [Part(Fraction(1, 9)).steps(steps) for steps in (1, 8, 9, 10, 18)]
    assert shares == [1, 1, 1, 2, 2] and Part(Fraction(1)).steps(5) == 5


def test_parts_end_at_the_same_weights_and_keep_the_schedule_of_the_whole(
    tmp_path: Path, tiny: Path, files: tuple[Path, Path, Path]
) -> None:
    whole = started(tmp_path / "whole", tiny, files)
    assert carry_out(whole) == 0
    parts = started(tmp_path / "parts", tiny, files)
    for share, step in ((Fraction(1, 3), 3), (Fraction(1, 3), 3), (Fraction(2, 3), 5), (Fraction(1), 7)):
        assert carry_out(parts, rung=(share, False)) == 0
        left = events(parts)[-2:]
        assert [event["type"] for event in left] == ["rung", "stopped"] and left[1]["step"] == step
        assert (left[0]["share"], left[0]["step"], left[0]["steps"]) == (str(share), step, 7)
        assert not parts.model.exists()
        report = json.loads(parts.report.read_text())
        assert report["proof"] is None and report["steps"] == step and f"step {step} of 7" in report["proof_note"]
        assert left[0]["loss"] == report["tuned"]["loss"] and parts.page.is_file()
    steps = [(event["step"], event["learning_rate"], event["loss"]) for event in events(parts, "step")]
    assert steps == [(event["step"], event["learning_rate"], event["loss"]) for event in events(whole, "step")]
    told = [event for event in events(whole, "validation") if event["step"] == 7]
    assert events(parts, "rung")[-1]["loss"] == told[-1]["loss"]
    assert carry_out(parts) == 0
    assert same(parts, whole) and events(parts)[-1]["status"] == "succeeded"


def test_a_rung_is_measured_again_when_its_event_was_lost(
    tmp_path: Path, tiny: Path, files: tuple[Path, Path, Path]
) -> None:
    """Killed between the checkpoint and the event: no step is taken twice."""
    run = started(tmp_path / "run", tiny, files)
    assert carry_out(run, rung=(Fraction(1, 2), False)) == 0
    first = events(run, "rung")[0]
    lines = [line for line in run.events_file.read_text().splitlines() if '"type": "rung"' not in line]
    run.events_file.write_text("\n".join(lines[:-1]) + "\n")
    assert carry_out(run, rung=(Fraction(1, 2), False)) == 0
    again = events(run, "rung")
    assert [(event["step"], event["loss"]) for event in again] == [(first["step"], first["loss"])]
    assert len(events(run, "step")) == 4


def test_a_score_is_of_the_checkpoint_on_the_validation_rows(
    tmp_path: Path, tiny: Path, files: tuple[Path, Path, Path]
) -> None:
    """The same as the published checkpoint answers, by another way to ask."""
    decide = write(tmp_path / "decide.jsonl", [*chats(3), *chats(1, 100)])
    run = started(
        tmp_path / "run", tiny, files, publish_checkpoints=1, validation=str(decide), metric="text", learning_rate=1e-2
    )
    assert main(["--score", "1/2", str(run.path)]) == 0
    rung = events(run, "rung")[0]
    assert (rung["metric"], rung["rows"], rung["step"], rung["higher_is_better"]) == ("text", 4, 4, True)
    from luthier.data.formats import read_examples
    from luthier.data.render import Renderer
    from luthier.engine import evaluate, models

    loaded = models.load_for_use(str(checkpoint.path_of(run.published, 4)), "float32")
    examples = [item for item in read_examples(decide) if hasattr(item, "messages")]
    plan = evaluate.prove.Plan("text")
    report = evaluate.evaluate(loaded, Renderer.load(loaded.folder), examples, compare=False, plan=plan)
    assert report.proof is not None and len(report.proof.rows) == 4
    assert rung["score"] == pytest.approx(sum(row.scores["tuned"] for row in report.proof.rows) / 4) and rung["score"]


def test_where_ability_is_to_be_kept_the_base_and_what_was_forgotten_are_told(
    tmp_path: Path, tiny: Path, files: tuple[Path, Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from luthier.data.render import Renderer
    from luthier.engine import forget, models
    from luthier.proof import probe
    from luthier.proof.forgetting import compare
    from luthier.spec.keeping import ITEMS

    monkeypatch.setenv("LUTHIER_HOME", str(tmp_path / "home"))
    run = started(
        tmp_path / "run", tiny, files, publish_checkpoints=1, metric="text", learning_rate=1e-2, keep_general=True
    )
    assert carry_out(run, rung=(Fraction(1, 2), True)) == 0
    told = events(run, "rung")[0]
    items = probe.sample(probe.half(probe.general(), 0), ITEMS)
    renderer = Renderer.load(checkpoint.path_of(run.published, 4))
    scores = [
        forget.measure(models.load_for_use(str(folder), "float32").model, renderer, items)
        for folder in (tiny, checkpoint.path_of(run.published, 4))
    ]
    assert told["forgetting"] == pytest.approx(compare(items, *scores, "base").loss, abs=1e-6)
    assert told["base"] is not None and told["base"] != told["score"]


def test_the_proof_is_measured_on_rows_of_its_own(tmp_path: Path, tiny: Path, files: tuple[Path, Path, Path]) -> None:
    run = train(
        tmp_path / "run", tiny, files[0], **OPTIONS, validation=str(files[1]), proof_data=str(files[2]), proof_rows=9
    )
    proof = json.loads(run.report.read_text())["proof"]
    assert [row["prompt"] for row in proof["rows"]] == [f"say number {n} again" for n in (200, 201, 202, 0)]
    assert any(note.startswith("1 of the proof's rows ask what training rows ask") for note in proof["notes"])


def test_proof_rows_need_no_validation(tmp_path: Path, tiny: Path, files: tuple[Path, Path, Path]) -> None:
    run = train(tmp_path / "run", tiny, files[0], **OPTIONS, proof_data=str(files[2]), proof_rows=2)
    report = json.loads(run.report.read_text())
    assert len(report["proof"]["rows"]) == 2 and report["tuned"] is None


def test_broken_proof_rows_are_refused_before_the_first_step(
    tmp_path: Path, tiny: Path, files: tuple[Path, Path, Path]
) -> None:
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"messages": 3}\n')
    failed = refused(tmp_path / "run", tiny, files[0], **OPTIONS, proof_data=str(broken))
    assert failed["param"] == "proof_data" and failed["code"] == "invalid_data"
