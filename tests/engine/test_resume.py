"""Going on from odd states: what a run must survive, what it must refuse, and the seed that nobody chose."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from luthier.engine import checkpoint, machine, models
from luthier.engine.__main__ import carry_out
from luthier.engine.train import Loop
from luthier.spec.run import RunFolder
from tests import tiny as tiny_models
from tests.engine.runs import chats, events, lay_out, losses, process, train, weights, write

OPTIONS: dict[str, Any] = {"max_steps": 5, "checkpoint_every": 2, "precision": "float32"}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("data") / "train.jsonl", chats(10))


@pytest.fixture
def stopped(tmp_path: Path, tiny: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> RunFolder:
    """A run that was stopped after step 3 of 5."""
    run = lay_out(tmp_path / "run", tiny, data, **OPTIONS)
    record = Loop._record

    def ask(loop: Loop, measured: dict[str, Any], validation: dict[str, Any] | None) -> None:
        record(loop, measured, validation)
        if loop.step == 3:
            loop.run.ask_to_stop()

    with monkeypatch.context() as patched:
        patched.setattr(Loop, "_record", ask)
        assert carry_out(run) == 0
    assert events(run)[-1]["type"] == "stopped"
    return run


def rewrite(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    "damage",
    [
        b"step;epoch;loss\n\xff\xfe1;2;3\n",  # what another program made of it
        b"x" + b"," * 9 + b"\n1,0.4,6.1,0.001,2.2,100,20,0.1,,\n\x00\x00\x00",
        None,
    ],
)
def test_a_damaged_table_of_metrics_does_not_end_a_run(stopped: RunFolder, damage: bytes | None) -> None:
    if damage is None:
        stopped.metrics.unlink()
    else:
        stopped.metrics.write_bytes(damage)
    assert carry_out(stopped) == 0
    lines = stopped.metrics.read_text().splitlines()
    assert lines[0].startswith("step,epoch,loss")
    assert [line.split(",")[0] for line in lines[1:]][-2:] == ["4", "5"]


@pytest.mark.parametrize("text", ["{}", "[]", '{"settings": {}}', "{half", None])
def test_a_damaged_spec_is_named(stopped: RunFolder, text: str | None) -> None:
    if text is None:
        stopped.spec.unlink()
    else:
        stopped.spec.write_text(text)
    assert carry_out(stopped) == 1
    failed = events(stopped)[-1]
    assert str(stopped.spec) in failed["message"] and failed["hint"] == "Start a new run."


@pytest.mark.parametrize("change", [{"dropout": 0.5}, {"schedule": "linear"}, {"method": "rslora"}, {"rank": 4}])
def test_a_run_cannot_go_on_with_other_options(stopped: RunFolder, change: dict[str, Any]) -> None:
    """Also those that come to no number in the settings."""
    rewrite(stopped.request, **change)
    assert carry_out(stopped) == 2
    assert events(stopped)[-1]["message"] == "The run cannot go on: the settings changed since it was started."


def test_a_damaged_request_is_named(stopped: RunFolder) -> None:
    stopped.request.write_text('{"model": "x"}')
    assert carry_out(stopped) == 2
    assert str(stopped.request) in events(stopped)[-1]["message"]


def test_a_seed_of_chance_outlives_an_attempt_without_a_checkpoint(
    tmp_path: Path, tiny: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever reads spec.json, or resumes after a kill at step 1, has the run that was started."""
    run = lay_out(tmp_path / "run", tiny, data, seed=None, **OPTIONS)
    with monkeypatch.context() as patched:
        patched.setattr(Loop, "go", lambda loop, start: 1 / 0)
        assert carry_out(run) == 1
    seed = json.loads(run.spec.read_text())["settings"]["seed"]
    assert carry_out(run) == 0
    assert json.loads(run.spec.read_text())["settings"]["seed"] == seed
    straight = train(tmp_path / "straight", tiny, data, **{**OPTIONS, "seed": seed})
    assert all(torch.equal(tensor, weights(straight)[name]) for name, tensor in weights(run).items())


def test_micro_batches_are_what_half_of_the_free_memory_holds(
    tmp_path: Path, tiny: Path, data: Path, stopped: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the start; a run that goes on keeps its number, whatever is free by then. The step is the same either way."""

    def number(run: RunFolder) -> int:
        return int(json.loads(run.spec.read_text())["settings"]["micro_tokens"])

    monkeypatch.setattr(models, "activation_bytes", lambda model: 1000)
    monkeypatch.setattr(machine, "memory_room", lambda: 1_400_000)
    assert number(stopped) == 2048
    assert carry_out(stopped) == 0 and number(stopped) == 2048
    small = train(tmp_path / "small", tiny, data, **OPTIONS)
    assert number(small) == 512
    assert number(train(tmp_path / "asked", tiny, data, **OPTIONS, micro_tokens=700)) == 700
    monkeypatch.setattr(machine, "memory_room", lambda: 0)
    assert number(train(tmp_path / "least", tiny, data, **OPTIONS)) == 256
    assert losses(small) == pytest.approx(losses(stopped), rel=1e-4)


def test_two_ranks_share_a_seed_of_chance(tmp_path: Path, tiny: Path, data: Path) -> None:
    """Each drawing its own, they would train different adapters on different rows, and say nothing."""
    options = {**OPTIONS, "max_steps": 3, "micro_tokens": 60}
    run = lay_out(tmp_path / "two", tiny, data, seed=None, **options)
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    assert process(run, *launcher).wait(timeout=120) == 0, run.log.read_text()
    seed = json.loads(run.spec.read_text())["settings"]["seed"]
    alone = train(tmp_path / "one", tiny, data, **{**options, "seed": seed})
    # The mean: Adam turns the rounding noise of a gradient near zero into a whole step, so single weights may differ.
    assert max(float((tensor - weights(alone)[name]).abs().mean()) for name, tensor in weights(run).items()) < 1e-4


def test_validation_rows_that_are_trained_on_are_told(tmp_path: Path, tiny: Path, data: Path) -> None:
    held = write(tmp_path / "held.jsonl", [*chats(2), *chats(3, start=50)])
    run = train(tmp_path / "run", tiny, data, validation=str(held), **OPTIONS)
    told = [event["message"] for event in events(run, "warning")]
    assert "2 of 5 validation rows ask what training rows ask." in told
    run = train(tmp_path / "split", tiny, data, validation="0.3", **OPTIONS)
    assert events(run, "warning") == []


def test_validation_rows_that_are_left_out_are_told(tmp_path: Path, data: Path) -> None:
    model = tiny_models.make_model(tmp_path / "m", max_positions=64)
    long = {"messages": [{"role": "user", "content": "fox " * 60}, {"role": "assistant", "content": "yes"}]}
    held = write(tmp_path / "held.jsonl", [*chats(2, start=50), long])
    run = train(tmp_path / "run", model, data, validation=str(held), overlong="drop", **OPTIONS)
    told = [event["message"] for event in events(run, "warning")]
    assert "1 validation rows were dropped and 0 cut at 64 tokens." in told


def test_the_best_of_many_validations_is_kept(tmp_path: Path, tiny: Path, data: Path) -> None:
    """Also when it does not fall on a step that checkpoints: the report names it."""
    held = write(tmp_path / "held.jsonl", chats(5, start=50))
    options = {**OPTIONS, "max_steps": 10, "checkpoint_every": 10, "validate_every": 1, "schedule": "constant"}
    run = train(tmp_path / "run", tiny, data, validation=str(held), **{**options, "learning_rate": 0.05})
    found = {event["step"]: event["loss"] for event in events(run, "validation") if event["step"]}
    best = min(found, key=lambda step: (found[step], step))
    assert json.loads(run.report.read_text())["best_step"] == best < 10
    assert checkpoint.steps(run.checkpoints) == [best, 10]
