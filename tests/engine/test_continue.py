"""Going on from a tuned model, checkpoints that can be used, and what the steps say about accuracy."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from luthier.engine import attention, checkpoint, forest, models, step, stream
from luthier.engine.__main__ import carry_out
from luthier.engine.setup import step_rows
from luthier.engine.train import Loop
from luthier.spec.job import TrainRequest
from luthier.spec.run import RunFolder
from tests import tiny as tiny_models
from tests.engine.runs import chats, events, lay_out, losses, refused, train, weights, write

PLAIN: dict[str, Any] = {"precision": "float32", "epochs": 2, "warmup": 0.0, "learning_rate": 5e-3}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("data") / "train.jsonl", chats(12))


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory, tiny: Path, data: Path) -> RunFolder:
    return train(tmp_path_factory.mktemp("parent") / "run", tiny, data, rank=4, alpha=12.0, **PLAIN)


def loss_of(folder: Path, run: RunFolder, tiny: Path, data: Path, precision: models.Precision) -> float:
    """What the model in `folder` loses on the rows of the first step of `run`."""
    from luthier.data.dataset import prepare
    from luthier.data.render import Renderer

    rows = prepare([data], Renderer.load(tiny), max_length=512).rows
    loaded = models.load_for_use(str(folder), precision).model
    attention.install(step.inner(loaded))
    first = [rows[index] for index in step_rows(0, 4, len(rows), 7)]
    loss = stream.measure_rows(loaded, first, 2048).loss
    assert loss is not None
    return loss


# --- continue_from --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "options"),
    [("lora", {}), ("rslora", {}), ("dora", {}), ("pissa", {}), ("lora", {"target_modules": ["q_proj", "up_proj"]})],
)
def test_an_adapter_goes_on_as_itself(
    tmp_path: Path, tiny: Path, data: Path, method: str, options: dict[str, Any]
) -> None:
    """Its rank, alpha, kind and modules are kept, the first loss is its own, and the result fits the untouched base."""
    parent = train(tmp_path / "parent", tiny, data, method=method, rank=4, alpha=12.0, **PLAIN, **options)
    child = train(tmp_path / "child", tiny, data, continue_from=str(parent.path), **PLAIN)
    before, after = (json.loads((run.model / "adapter_config.json").read_text()) for run in (parent, child))
    for key in ("r", "lora_alpha", "use_rslora", "use_dora", "target_modules"):
        assert before[key] == after[key]
    assert losses(child)[0] == pytest.approx(loss_of(parent.model, child, tiny, data, "float32"), abs=1e-5)
    assert losses(child)[0] < losses(parent)[0]
    notes = [json.loads((run.model / "luthier.json").read_text())["base"] for run in (parent, child)]
    assert notes[0] == notes[1]
    assert models.load_for_use(str(child.path), "float32").adapter


def test_float32_weights_of_an_adapter_are_not_rounded(
    tmp_path: Path, tiny: Path, data: Path, adapter: RunFolder
) -> None:
    """A bfloat16 run whose updates are too small to matter gives the parent back, to the last bits of float32."""
    options = {**PLAIN, "precision": "bfloat16", "learning_rate": 1e-9, "epochs": 1}
    child = train(tmp_path / "child", tiny, data, continue_from=str(adapter.model), **options)
    for name, value in weights(adapter).items():
        assert torch.allclose(weights(child)[name], value, atol=1e-7, rtol=0), name


@pytest.mark.parametrize("method", ["full", "freeze:1"])
def test_a_full_model_goes_on_and_still_names_its_base(tmp_path: Path, tiny: Path, data: Path, method: str) -> None:
    parent = train(tmp_path / "parent", tiny, data, method=method, **PLAIN)
    child = train(tmp_path / "child", tiny, data, method=method, continue_from=str(parent.model), **PLAIN)
    assert losses(child)[0] == pytest.approx(loss_of(parent.model, child, tiny, data, "float32"), abs=1e-5)
    notes = [json.loads((run.model / "luthier.json").read_text())["base"] for run in (parent, child)]
    assert notes[0] == notes[1] and notes[1]["folder"] == str(tiny)
    failed = refused(tmp_path / "lora", tiny, data, continue_from=str(parent.model))
    assert failed["param"] == "continue_from" and "--method full" in failed["hint"]


def test_the_template_is_the_parents(tmp_path: Path, tiny: Path, data: Path) -> None:
    parent = train(tmp_path / "parent", tiny, data, template="plain", **PLAIN)
    child = train(tmp_path / "child", tiny, data, continue_from=str(parent.path), **PLAIN)
    said = [(run.model / "chat_template.jinja").read_text() for run in (parent, child)]
    assert said[0] == said[1] != (tiny / "chat_template.jinja").read_text()


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"rank": 8}, "rank"),
        ({"alpha": 3.0}, "alpha"),
        ({"target_modules": ["q_proj"]}, "target_modules"),
        ({"method": "dora"}, "method"),
        ({"method": "full"}, "method"),
    ],
)
def test_options_that_contradict_the_parent(
    tmp_path: Path, tiny: Path, data: Path, adapter: RunFolder, options: dict[str, Any], param: str
) -> None:
    failed = refused(tmp_path / "run", tiny, data, continue_from=str(adapter.path), **options)
    assert failed["param"] == param and failed["hint"]


def test_what_cannot_be_gone_on_from(tmp_path: Path, tiny: Path, data: Path, adapter: RunFolder) -> None:
    other = tiny_models.make_model(tmp_path / "other", seed=5)
    failed = refused(tmp_path / "a", other, data, continue_from=str(adapter.path))
    assert failed["param"] == "continue_from" and "which is not" in failed["message"]
    failed = refused(tmp_path / "b", tiny, data, continue_from=str(tmp_path / "nothing"))
    assert failed["param"] == "continue_from" and failed["code"] == "not_found"
    failed = refused(tmp_path / "c", tiny, data, continue_from=str(tiny))  # not tuned from anything
    assert failed["param"] == "continue_from"
    bare = shutil.copytree(adapter.model, tmp_path / "bare")
    (bare / "adapter_model.safetensors").unlink()
    failed = refused(tmp_path / "d", tiny, data, continue_from=str(bare))
    assert failed["param"] == "continue_from" and "adapter_model.safetensors" in failed["message"]


def interrupted(run: RunFolder, monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    """Carry `run` out until the process dies within step `after` + 1."""
    begin = Loop._one_step

    def die(loop: Loop, number: int) -> dict[str, Any]:
        if number == after:
            raise KeyboardInterrupt
        return begin(loop, number)

    with monkeypatch.context() as patched:
        patched.setattr(Loop, "_one_step", die)
        with pytest.raises(KeyboardInterrupt):
            carry_out(run)


def test_resume_is_exact(
    tmp_path: Path, tiny: Path, data: Path, adapter: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that goes on from a model and publishes its checkpoints, killed and resumed, is the run left alone; and it
    notices another parent."""
    options = {**PLAIN, "checkpoint_every": 2, "publish_checkpoints": 2, "dropout": 0.1}
    place = shutil.copytree(adapter.model, tmp_path / "place")
    straight = train(tmp_path / "straight", tiny, data, continue_from=str(adapter.path), **options)
    run = lay_out(tmp_path / "run", tiny, data, continue_from=str(place), **options)
    interrupted(run, monkeypatch, 3)
    assert sorted(path.name for path in run.published.iterdir()) == ["step-00000002"]

    note = place / "adapter_config.json"
    kept = note.read_bytes()
    note.write_bytes(kept.replace(b'"lora_alpha": 12.0', b'"lora_alpha": 12.5'))
    assert kept != note.read_bytes()
    assert carry_out(run) == 2 and "changed since it was started" in events(run)[-1]["message"]
    note.write_bytes(kept)
    assert carry_out(run) == 0, events(run)[-1]
    assert all(torch.equal(value, weights(run)[name]) for name, value in weights(straight).items())
    assert sorted(path.name for path in run.published.iterdir()) == ["step-00000004", "step-00000006"]


# --- published checkpoints ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["lora", "pissa", "full"])
def test_a_published_checkpoint_is_the_checkpoint(tmp_path: Path, tiny: Path, data: Path, method: str) -> None:
    run = train(tmp_path / "run", tiny, data, method=method, checkpoint_every=2, publish_checkpoints=3, **PLAIN)
    told = events(run, "checkpoint")
    assert [event["step"] for event in told] == [2, 4, 6]
    for event in told:
        folder = Path(event["published"])
        assert folder == checkpoint.path_of(run.published, event["step"])
        for name in ("tokenizer.json", "chat_template.jinja", "generation_config.json", "luthier.json"):
            assert (folder / name).is_file()
        models.load_for_use(str(folder), "float32")
    last = Path(told[-1]["published"])
    for path in sorted(run.model.iterdir()):
        assert (last / path.name).read_bytes() == path.read_bytes()
    early = loss_of(run.published / "step-00000002", run, tiny, data, "float32")
    assert early > loss_of(run.model, run, tiny, data, "float32")


def test_a_checkpoint_that_was_not_told_is_told_on_resume(
    tmp_path: Path, tiny: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = lay_out(tmp_path / "run", tiny, data, checkpoint_every=2, publish_checkpoints=1, **PLAIN)
    tell = Loop._tell_checkpoint

    def die(loop: Loop) -> None:
        if loop.step == 4:
            raise KeyboardInterrupt
        tell(loop)

    with monkeypatch.context() as patched:
        patched.setattr(Loop, "_tell_checkpoint", die)
        with pytest.raises(KeyboardInterrupt):
            carry_out(run)
    assert carry_out(run) == 0
    assert [event["step"] for event in events(run, "checkpoint")] == [2, 4, 6]
    assert [path.name for path in run.published.iterdir()] == ["step-00000006"]


def test_checkpoints_are_not_published_unasked(adapter: RunFolder) -> None:
    assert {event["published"] for event in events(adapter, "checkpoint")} == {None}
    assert not adapter.published.exists()


# --- older runs -----------------------------------------------------------------------------------------------------


def test_a_run_of_an_older_version_goes_on(
    tmp_path: Path, tiny: Path, data: Path, adapter: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its papers lack the newer options and the parent."""
    run = lay_out(tmp_path / "run", tiny, data, rank=4, alpha=12.0, checkpoint_every=2, **PLAIN)
    interrupted(run, monkeypatch, 3)
    spec = json.loads(run.spec.read_text())
    del spec["parent"]
    newer = (
        "continue_from", "prompt_loss_weight", "learning_rate_multiplier", "publish_checkpoints",
        "classification_n_classes", "classification_positive_class", "classification_betas",
    )  # fmt: skip
    for name in newer:
        del spec["request"][name]
    run.spec.write_text(json.dumps(spec))
    assert carry_out(run) == 0, events(run)[-1]
    assert all(torch.equal(value, weights(run)[name]) for name, value in weights(adapter).items())
    assert TrainRequest.model_validate(spec["request"]).learning_rate_multiplier == 1.0


# --- what steps say -------------------------------------------------------------------------------------------------


def test_examples_count_rows_and_repeats(adapter: RunFolder) -> None:
    assert [event["examples"] for event in events(adapter, "step")] == [4, 8, 12, 16, 20, 24]


def test_the_last_step_is_short_and_epochs_run_on(tmp_path: Path, tiny: Path, data: Path) -> None:
    """12 rows, 2 epochs, 5 a step: ceil(24 / 5) steps, and no row is left out at the end of an epoch."""
    run = train(tmp_path / "run", tiny, data, **PLAIN, batch_size=5)
    assert [event["examples"] for event in events(run, "step")] == [5, 10, 15, 20, 24]


def test_accuracies_are_those_of_the_plain_forward(tmp_path: Path, tiny: Path, data: Path, adapter: RunFolder) -> None:
    """Step 1 of a run that goes on from an adapter, and a validation, against the model's own forward, row by row."""
    from luthier.data.dataset import prepare
    from luthier.data.render import Renderer

    parent = train(tmp_path / "parent", tiny, data, **{**PLAIN, "epochs": 25})
    run = train(
        tmp_path / "run", tiny, data, continue_from=str(parent.path), validation=str(data), micro_tokens=60,
        max_steps=1, **PLAIN,
    )  # fmt: skip
    rows = prepare([data], Renderer.load(tiny), max_length=512).rows
    model = models.load_for_use(str(parent.path), "float32").model

    def plain(indices: list[int]) -> tuple[float, float]:
        right: list[np.ndarray[Any, Any]] = []
        for ids, marks in (rows[index] for index in indices):
            with torch.no_grad():
                said = model(input_ids=torch.from_numpy(ids.astype(np.int64))[None]).logits[0, :-1].argmax(-1).numpy()
            right.append((said == ids[1:])[marks[1:] > 0])
        return float(np.concatenate(right).mean()), float(np.mean([row.all() for row in right]))

    first = events(run, "step")[0]
    assert (first["token_accuracy"], first["sequence_accuracy"]) == pytest.approx(plain(step_rows(0, 4, 12, 7)))
    before = events(run, "validation")[0]
    assert (before["token_accuracy"], before["sequence_accuracy"]) == pytest.approx(plain(list(range(12))))
    assert 0 < before["sequence_accuracy"] < before["token_accuracy"] <= 1


def test_a_tally_counts_answers_only() -> None:
    """Two rows, one of them right in every answer token; a prompt token with a small weight is no answer."""
    rows = [
        (np.array([1, 2, 3, 4], np.int32), np.array([0, 0.1, 1, 1], np.float32)),
        (np.array([1, 2, 5], np.int32), np.array([0, 0.1, 1], np.float32)),
    ]
    tree = forest.build(rows)
    tally = step.Tally()
    right = [not (target == 5 or weight < 1) for target, weight in zip(tree.targets, tree.weights, strict=True)]
    tally.see((tree, torch.tensor(right)))
    assert (tally.tokens, tally.right, tally.rows, tally.whole) == (3, 2, 2, 1)
    assert (tally.token_accuracy, tally.sequence_accuracy) == (2 / 3, 0.5)
    assert step.Tally().token_accuracy is None and step.Tally().sequence_accuracy is None
