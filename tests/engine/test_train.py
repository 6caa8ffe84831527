"""Laws of the loop: accumulation, seeds, resuming, ranks, refusals; each on a tiny random model in float32."""

from __future__ import annotations

import csv
import json
import os
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from luthier.engine import checkpoint, models, optimizer, setup, stream
from luthier.engine.__main__ import carry_out
from luthier.spec.job import Settings, learning_rate_at, make_request
from tests import tiny as tiny_models
from tests.engine.runs import chats, events, lay_out, losses, process, refused, train, weights, write

Weights = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("data") / "train.jsonl", chats(10, system="Answer briefly, and with care."))


def equal(left: Weights, right: Weights) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def close(left: Weights, right: Weights, tolerance: float) -> float:
    assert left.keys() == right.keys()
    return max(float((left[name] - right[name]).abs().max()) for name in left)


# --- numerics -------------------------------------------------------------------------------------------------------


def test_accumulation_is_a_bigger_batch(tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """B25, B27: rows of very different lengths; any micro-batch gives the same step, loss and norm.

    Adam divides by the gradient's size, which turns rounding noise into whole steps; with epsilon 1 it is as smooth
    as SGD, so that weights can be compared.
    """
    monkeypatch.setattr(optimizer, "EPSILON", 1.0)
    rows = chats(4)
    rows[3]["messages"][1]["content"] = "a much longer answer " * 8
    file = write(tmp_path / "d.jsonl", rows)
    for smoothing in (0.0, 0.1):
        runs = [
            train(
                tmp_path / f"{budget}-{smoothing}",
                tiny,
                file,
                micro_tokens=budget,
                epochs=1,
                precision="float32",
                method="full",
                learning_rate=1e-2,
                label_smoothing=smoothing,
                warmup=0.0,
            )
            for budget in (1, 150, 4096)
        ]
        first = events(runs[0], "step")[0]
        for run in runs[1:]:
            other = events(run, "step")[0]
            assert other["loss"] == pytest.approx(first["loss"], abs=3e-6)
            assert other["grad_norm"] == pytest.approx(first["grad_norm"], rel=1e-5)
            assert close(weights(runs[0]), weights(run), 1) < 1e-6


def test_bfloat16_masters_take_small_updates(tmp_path: Path) -> None:
    """B30: a weight near 1 takes 100 updates of 1e-4; its bfloat16 copy is rounded from the master."""
    copy = torch.nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    masters = optimizer.Masters({"w": copy}, weight_decay=0.0)
    for _ in range(100):
        copy.grad = torch.full((4,), -1.0, dtype=torch.bfloat16)
        masters.collect()
        masters.step(1e-4, max_norm=1e9)
    assert masters.values["w"].tolist() == pytest.approx([1.01] * 4, abs=1e-5)
    assert copy.tolist() == [1.0078125] * 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_steady_gradients_keep_their_place(dtype: torch.dtype) -> None:
    """Whatever steps are taken, and they come to the same bits."""
    found = []
    for steady in (True, False):
        torch.manual_seed(0)
        weight = torch.nn.Parameter(torch.randn(6, 5).to(dtype))
        masters = optimizer.Masters({"w": weight}, weight_decay=0.1, steady=steady)
        places = set()
        for _ in range(3):
            for _ in range(2):
                (weight @ torch.randn(5, 4).to(dtype)).square().sum().backward()
                masters.collect()
            grad = masters.values["w"].grad
            assert grad is not None
            places.add(grad.data_ptr())
            masters.step(0.1, max_norm=1.0)
        assert not steady or len(places) == 1
        found.append(masters.state())
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())


def test_full_tuning_in_bfloat16_follows_float32(tmp_path: Path, data: Path, tiny: Path) -> None:
    """B30 on a run: the masters keep what bfloat16 would swallow, and the loss follows the float32 run."""
    options: dict[str, Any] = {
        "method": "full", "learning_rate": 1e-5, "max_steps": 40, "epochs": 20, "schedule": "constant",
        "warmup": 0.0, "checkpoint_every": 40,
    }  # fmt: skip
    rough = train(tmp_path / "bf16", tiny, data, precision="bfloat16", **options)
    exact = train(tmp_path / "fp32", tiny, data, precision="float32", **options)
    assert losses(rough)[-1] == pytest.approx(losses(exact)[-1], rel=0.03)
    start = models.load_base(tiny, "float32").state_dict()
    kept = checkpoint.load(rough.checkpoints, 40)
    assert kept is not None
    big = changed = 0
    for name, master in kept[0].items():
        if name.startswith("master."):
            before = start[name.removeprefix("master.")]
            chosen = before.abs() > 0.02
            big += int(chosen.sum())
            changed += int(((master != before.bfloat16().float()) & chosen).sum())
    assert changed / big > 0.2


@pytest.mark.parametrize("rows", [1, 3, 10])
def test_less_data_than_a_batch_still_trains(tmp_path: Path, tiny: Path, rows: int) -> None:
    """B23: at least one step, weights moved, the reported loss is the real one."""
    file = write(tmp_path / "d.jsonl", chats(rows))
    run = train(tmp_path / "run", tiny, file, batch_size=32, epochs=1, precision="float32")
    assert len(losses(run)) == 1
    assert all(float(tensor.abs().max()) > 0 for name, tensor in weights(run).items() if "lora_B" in name)
    request = make_request({"model": str(tiny), "data": [str(file)], "seed": 7, "precision": "float32"})
    ready = setup.make_ready(run, request, setup.silent, None)
    sums = stream.measure_rows(ready.model, [ready.train[n] for n in range(rows)], 10_000)
    assert losses(run)[0] == pytest.approx(sums.loss, abs=1e-5)


def test_steps_cross_epochs_and_every_row_comes_once_an_epoch() -> None:
    seen = [index for start in range(0, 30, 4) for index in setup.step_rows(start, min(4, 30 - start), 10, 3)]
    epochs = [seen[:10], seen[10:20], seen[20:]]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_schedules() -> None:
    settings = Settings(
        epochs=1, batch_size=1, learning_rate=1.0, steps=10, warmup_steps=2, seed=0, max_length=8,
        micro_tokens=8, precision="float32", alpha=1.0,
    )  # fmt: skip
    linear = [round(learning_rate_at(n, settings, "linear"), 4) for n in range(10)]
    assert linear == [0.5, 1.0, 1.0, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125]
    cosine = [learning_rate_at(n, settings, "cosine") for n in range(10)]
    assert cosine[2] == 1.0 and cosine[6] == pytest.approx(0.5) and sorted(cosine[2:], reverse=True) == cosine[2:]
    assert [learning_rate_at(n, settings, "constant") for n in (0, 1, 9)] == [0.5, 1.0, 1.0]


def test_validation_numbers_are_exact(tmp_path: Path, tiny: Path, data: Path) -> None:
    """B28 on a run: the base's score before step 1, and the same figures from an independent forward."""
    held = write(tmp_path / "held.jsonl", chats(5, start=50))
    run = train(tmp_path / "run", tiny, data, validation=str(held), epochs=1, precision="float32")
    first = events(run, "validation")[0]
    assert first["step"] == 0
    request = make_request({"model": str(tiny), "data": [str(held)], "seed": 7, "precision": "float32"})
    ready = setup.make_ready(run, request, setup.silent, None)
    ready.model.get_base_model().set_attn_implementation("eager")
    ready.model.eval().cpu()
    nll = hits = count = 0.0
    for ids, row_weights in ready.train:
        tokens = torch.from_numpy(ids.astype(np.int64))
        with torch.no_grad():
            logits = ready.model(input_ids=tokens[None], use_cache=False).logits[0, :-1]
        learnt = torch.from_numpy(row_weights[1:] > 0)
        picked = logits.log_softmax(-1).gather(1, tokens[1:, None])[:, 0]
        nll -= float(picked[learnt].sum())
        hits += float((logits.argmax(-1) == tokens[1:])[learnt].sum())
        count += int(learnt.sum())
    assert first["loss"] == pytest.approx(nll / count, abs=1e-5)
    assert first["token_accuracy"] == pytest.approx(hits / count)
    assert first["supervised_tokens"] == count
    report = json.loads(run.report.read_text())
    assert report["base"]["loss"] == first["loss"]
    assert report["tuned"]["loss"] == events(run, "validation")[-1]["loss"]


# --- the same run, always -------------------------------------------------------------------------------------------


def test_seeds_reach_everything(tmp_path: Path, tiny: Path, data: Path) -> None:
    """B34: adapter, order and dropout follow the seed; a seed that was not given is chosen and recorded."""
    options: dict[str, Any] = {"epochs": 1, "dropout": 0.2, "validation": "0.3"}
    first, again = (train(tmp_path / name, tiny, data, seed=7, **options) for name in ("a", "b"))
    other = train(tmp_path / "c", tiny, data, seed=8, **options)
    adapter = "adapter_model.safetensors"
    assert (first.model / adapter).read_bytes() == (again.model / adapter).read_bytes()
    assert (first.model / adapter).read_bytes() != (other.model / adapter).read_bytes()
    request = make_request({"model": str(tiny), "data": [str(data)], "epochs": 1})
    run = type(first)(tmp_path / "d").create(request.model_dump(exclude_unset=True))
    assert carry_out(run) == 0
    seed = json.loads(run.spec.read_text())["settings"]["seed"]
    assert 0 <= seed < 2**31 and events(run, "prepared")[0]["settings"]["seed"] == seed


def settled(run: Any) -> tuple[list[tuple[Any, ...]], Weights]:
    """What must not depend on interruptions: each step's figures (the last taken) and the final weights."""
    steps = {event["step"]: event for event in events(run, "step")}
    figures = [
        tuple(steps[n][key] for key in ("step", "epoch", "loss", "learning_rate", "grad_norm", "tokens"))
        for n in sorted(steps)
    ]
    return figures, weights(run)


def test_a_stopped_run_goes_on_as_if_nothing_had_been(tmp_path: Path, tiny: Path, data: Path) -> None:
    """B33: dropout, shuffling, two epochs; stopped in the middle of the second; bit for bit the same."""
    options: dict[str, Any] = {
        "epochs": 2, "batch_size": 1, "dropout": 0.1, "checkpoint_every": 4, "validation": "0.2", "method": "dora",
    }  # fmt: skip
    straight = train(tmp_path / "straight", tiny, data, **options)
    run = lay_out(tmp_path / "stopped", tiny, data, **options)
    emit = run.emit

    def interrupting(type: str, **fields: Any) -> None:
        emit(type, **fields)
        if type == "step" and fields["step"] == 11:
            run.ask_to_stop()

    run.emit = interrupting  # type: ignore[method-assign]
    assert carry_out(run) == 0
    last = events(run)[-1]
    assert last["type"] == "stopped" and last["step"] == 11 and str(run.path) in last["resume"]
    assert not run.model.exists()
    run.emit = emit  # type: ignore[method-assign]
    assert carry_out(run) == 0
    assert [event["resumed_from"] for event in events(run, "started")] == [None, 11]
    figures, tensors = settled(run)
    expected, wanted = settled(straight)
    assert figures == expected and equal(tensors, wanted)
    with open(run.metrics, encoding="utf-8") as left, open(straight.metrics, encoding="utf-8") as right:
        resumed, plain = list(csv.DictReader(left)), list(csv.DictReader(right))
    assert [row["step"] for row in resumed] == [row["step"] for row in plain] == [str(n + 1) for n in range(16)]
    assert [row["loss"] for row in resumed] == [row["loss"] for row in plain]


def test_a_run_can_be_stopped_before_its_first_step(tmp_path: Path, tiny: Path, data: Path) -> None:
    """Reading a large file takes a while: Ctrl-C must not wait for it."""
    run = lay_out(tmp_path / "run", tiny, data, epochs=1)
    emit = run.emit

    def interrupting(type: str, **fields: Any) -> None:
        emit(type, **fields)
        if type == "phase" and fields["name"] == "data":
            run.ask_to_stop()

    run.emit = interrupting  # type: ignore[method-assign]
    assert carry_out(run) == 0
    assert events(run)[-1]["type"] == "stopped" and events(run)[-1]["step"] == 0 and not events(run, "prepared")
    run.emit = emit  # type: ignore[method-assign]
    assert carry_out(run) == 0 and events(run)[-1]["type"] == "finished"


def test_killed_at_random_instants(tmp_path: Path, tiny: Path, data: Path) -> None:
    """B40 ii: kill -9 wherever it falls, again and again; the run ends as if never interrupted, bit for bit."""
    options: dict[str, Any] = {
        "epochs": 6, "batch_size": 1, "dropout": 0.1, "checkpoint_every": 1, "validate_every": 20, "validation": "0.2",
    }  # fmt: skip
    straight = train(tmp_path / "straight", tiny, data, **options)
    run = lay_out(tmp_path / "killed", tiny, data, **options)
    chance = random.Random(11)
    killed = 0
    for _ in range(40):
        offset = max((offset for offset, _ in run.events()), default=0)
        engine = process(run)
        begun = time.monotonic()
        while engine.poll() is None and not any(e["type"] == "step" for _, e in run.events(offset)):
            time.sleep(0.01)
            assert time.monotonic() - begun < 120
        patience = chance.uniform(0.0, 0.25) if killed < 6 else 300
        try:
            engine.wait(patience)
        except subprocess.TimeoutExpired:
            os.killpg(engine.pid, signal.SIGKILL)
            engine.wait()
            killed += 1
        if run.model.exists() and events(run)[-1]["type"] == "finished":
            break
    assert killed >= 3 and events(run)[-1]["status"] == "succeeded"
    figures, tensors = settled(run)
    expected, wanted = settled(straight)
    assert figures == expected and equal(tensors, wanted)
    assert sorted(path.name for path in run.checkpoints.iterdir() if path.name.endswith(".tmp")) == []


def test_two_ranks_take_the_steps_of_one(tmp_path: Path, tiny: Path, data: Path) -> None:
    """torchrun with gloo: same figures, same weights to rounding; rank 0 alone writes."""
    options: dict[str, Any] = {
        "epochs": 2, "dropout": 0.1, "micro_tokens": 60, "validation": "0.2", "precision": "float32",
    }  # fmt: skip
    one = train(tmp_path / "one", tiny, data, **options)
    run = lay_out(tmp_path / "two", tiny, data, **options)
    engine = process(run, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    assert engine.wait(240) == 0, run.log.read_text()[-3000:]
    kinds = [[event["type"] for event in events(each) if event["type"] != "progress"] for each in (one, run)]
    assert kinds[0] == kinds[1]
    for left, right in zip(events(one, "step"), events(run, "step"), strict=True):
        assert right["loss"] == pytest.approx(left["loss"], abs=1e-5)
        assert right["grad_norm"] == pytest.approx(left["grad_norm"], rel=1e-3)
        assert right["physical_tokens"] == left["physical_tokens"]
    for left, right in zip(events(one, "validation"), events(run, "validation"), strict=True):
        assert right["loss"] == pytest.approx(left["loss"], abs=1e-5)
    left, right = weights(one), weights(run)  # the mean: Adam makes whole steps of rounding noise near zero
    assert max(float((left[name] - right[name]).abs().mean()) for name in left) < 1e-4


# --- checkpoints ----------------------------------------------------------------------------------------------------


def test_a_damaged_checkpoint_is_passed_over(tmp_path: Path, tiny: Path, data: Path) -> None:
    """B40 i: whatever is missing or cut off in the newest one, the one before is taken, and said."""
    folder = tmp_path / "checkpoints"
    tensors = {"a": torch.arange(100.0)}
    for damage in ("no tensors", "no state", "cut", "flipped"):
        shutil.rmtree(folder, ignore_errors=True)
        for number in (1, 2):
            checkpoint.save(folder, number, tensors, {"progress": {"n": number}})
        newest = checkpoint.path_of(folder, 2)
        file = newest / checkpoint.TENSORS
        if damage == "no tensors":
            file.unlink()
        elif damage == "no state":
            (newest / checkpoint.STATE).unlink()
        else:
            raw = bytearray(file.read_bytes())
            raw = raw[:-5] if damage == "cut" else raw[:-1] + bytes([raw[-1] ^ 1])
            file.write_bytes(raw)
        found, damaged = checkpoint.newest(folder)
        assert found is not None and found[1]["step"] == 1 and damaged == [2], damage
    shutil.rmtree(folder)
    assert checkpoint.newest(folder) == (None, [])


def test_a_full_disk_ends_the_run_and_keeps_what_was_there(tmp_path: Path, tiny: Path, data: Path) -> None:
    """B40 iii: a file-size limit hits the save part-way: failed with the reason, the earlier one whole."""
    import resource

    run = lay_out(tmp_path / "run", tiny, data, epochs=2, batch_size=5, checkpoint_every=1)
    emit = run.emit
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limiting(type: str, **fields: Any) -> None:
        emit(type, **fields)
        if type == "checkpoint" and fields["step"] == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))

    run.emit = limiting  # type: ignore[method-assign]
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        assert carry_out(run) == 75
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, previous)
    failed = events(run)[-1]
    assert failed["type"] == "failed" and "could not be written" in failed["message"]
    assert "The checkpoint of step 1 is intact" in failed["message"]
    assert sorted(path.name for path in run.checkpoints.iterdir()) == ["step-00000001"]
    run.emit = emit  # type: ignore[method-assign]
    assert carry_out(run) == 0 and events(run, "started")[-1]["resumed_from"] == 1


def test_best_and_last_checkpoints_are_kept(tmp_path: Path, tiny: Path, data: Path) -> None:
    run = train(tmp_path / "run", tiny, data, epochs=4, learning_rate=0.3, validation="0.3", schedule="constant")
    report = json.loads(run.report.read_text())
    kept = set(checkpoint.steps(run.checkpoints))
    assert kept == {report["best_step"], report["steps"]}
    validations = {event["step"]: event["loss"] for event in events(run, "validation") if event["step"]}
    assert report["best_step"] == min(validations, key=validations.__getitem__)
    assert report["validation_loss_best"] == min(validations.values())


def test_a_run_cannot_go_on_with_other_data(tmp_path: Path, tiny: Path) -> None:
    """B24's kind: identity is content, so the same path with other words is another data set."""
    file = write(tmp_path / "d.jsonl", chats(6))
    run = lay_out(tmp_path / "run", tiny, file, epochs=2, batch_size=2)
    emit = run.emit

    def interrupting(type: str, **fields: Any) -> None:
        emit(type, **fields)
        if type == "step" and fields["step"] == 2:
            run.ask_to_stop()

    run.emit = interrupting  # type: ignore[method-assign]
    assert carry_out(run) == 0
    file.write_text(file.read_text().replace("number 3", "number 4", 1))
    run.emit = emit  # type: ignore[method-assign]
    assert carry_out(run) == 2
    assert "the training data changed" in events(run)[-1]["message"]


def test_two_engines_never_share_a_run(tmp_path: Path, tiny: Path, data: Path) -> None:
    run = lay_out(tmp_path / "run", tiny, data, epochs=1)
    with run.owned():
        assert carry_out(run) == 75
    assert events(run) == [], "the other engine's events are not ours to write"


# --- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 5])
def test_rows_that_would_lose_their_answer(tmp_path: Path, tiny: Path, batch: int) -> None:
    """B16: refused by number; dropped or cut only when asked, and counted; what is saved is finite."""
    rows = chats(4)
    rows.insert(2, {"messages": [{"role": "user", "content": "word " * 200}, {"role": "assistant", "content": "yes"}]})
    file = write(tmp_path / "d.jsonl", rows)
    failed = refused(tmp_path / "error", tiny, file, max_length=64, batch_size=batch)
    assert failed["code"] == "invalid_data" and [problem["line"] for problem in failed["problems"]] == [3]
    assert "would lose the end of its answer" in failed["message"] and "at most 64" in failed["message"]
    for policy in ("drop", "truncate"):
        run = train(tmp_path / policy, tiny, file, max_length=64, batch_size=batch, overlong=policy, epochs=1)
        told = events(run, "prepared")[0]
        assert (told["dropped"], told["truncated"], told["train_rows"]) == (1, 0, 4)
        assert any("1 rows were dropped" in event["message"] for event in events(run, "warning"))
        assert all(bool(torch.isfinite(tensor).all()) for tensor in weights(run).values())


def test_a_cut_answer_is_counted(tmp_path: Path, tiny: Path) -> None:
    rows = chats(2)
    rows[1]["messages"][1]["content"] = "long " * 100
    file = write(tmp_path / "d.jsonl", rows)
    run = train(tmp_path / "run", tiny, file, max_length=64, overlong="truncate", epochs=1)
    told = events(run, "prepared")[0]
    assert (told["dropped"], told["truncated"], told["longest"]) == (0, 1, told["lost_tokens"] + 64)
    assert 0 < told["lost_supervised_tokens"] <= told["lost_tokens"]


def test_nothing_to_train_is_refused(tmp_path: Path, tiny: Path) -> None:
    long = [{"messages": [{"role": "user", "content": "word " * 200}, {"role": "assistant", "content": "yes"}]}] * 3
    failed = refused(tmp_path / "a", tiny, write(tmp_path / "a.jsonl", long), max_length=64, overlong="drop")
    assert "Nothing would be trained" in failed["message"] and "3 rows were dropped" in failed["message"]
    failed = refused(tmp_path / "b", tiny, write(tmp_path / "b.jsonl", []))
    assert "found no bytes at all" in failed["message"]
    mute = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 0}]}]
    failed = refused(tmp_path / "c", tiny, write(tmp_path / "c.jsonl", mute))
    assert failed["problems"][0]["line"] == 1


def test_every_bad_record_is_told(tmp_path: Path, tiny: Path) -> None:
    file = write(tmp_path / "d.jsonl", chats(20))
    lines = file.read_text().splitlines()
    lines[4], lines[12] = "{bad", '{"messages": []}'
    file.write_text("\n".join(lines))
    failed = refused(tmp_path / "run", tiny, file)
    assert [problem["line"] for problem in failed["problems"]] == [5, 13]
    assert failed["message"].startswith("2 problems in the data")


def test_a_template_that_refuses_names_the_row(tmp_path: Path) -> None:
    """B10 i: row 13 of 20 has a system turn that the template will not have."""
    from tests.data.styles import STYLES

    style = STYLES["gemma-like"]
    model = tiny_models.make_model(tmp_path / "m", template=style.source, extra_special=style.tokens)
    rows = chats(20)
    rows[12]["messages"].insert(0, {"role": "system", "content": "be brief"})
    failed = refused(tmp_path / "run", model, write(tmp_path / "d.jsonl", rows))
    assert [problem["line"] for problem in failed["problems"]] == [13]
    assert "System role not supported" in failed["message"]


def test_weights_that_diverge_are_not_published(tmp_path: Path, tiny: Path, data: Path) -> None:
    run = lay_out(
        tmp_path / "run", tiny, data, learning_rate=0.9, max_grad_norm=1e9, epochs=25, method="full",
        batch_size=2, weight_decay=0.9, schedule="constant", warmup=0.0, precision="float32",
    )  # fmt: skip
    original = stream.forward_backward

    def diverging(*arguments: Any, **options: Any) -> float:
        value = original(*arguments, **options)
        return value * float("nan") if len(events(run, "step")) == 3 else value

    stream.forward_backward = diverging
    try:
        assert carry_out(run) == 2
    finally:
        stream.forward_backward = original
    failed = events(run)[-1]
    assert failed["type"] == "failed" and "became nan" in failed["message"] and failed["param"] == "learning_rate"
    assert not run.model.exists()


def test_weights_that_did_not_change_are_not_published(tmp_path: Path, tiny: Path, data: Path) -> None:
    run = lay_out(tmp_path / "run", tiny, data, epochs=1, learning_rate=1e-30, method="freeze:1")
    assert carry_out(run) == 2
    assert "No weight differs" in events(run)[-1]["message"] and not run.model.exists()


def test_a_disk_with_no_room_for_the_result_is_refused_before_step_1(
    tmp_path: Path, tiny: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """B45: the save is tried before training."""
    from collections import namedtuple

    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9 - 10, 10))
    failed = refused(tmp_path / "run", tiny, data, epochs=1)
    assert failed["code"] == "unavailable" and "too full" in failed["message"] and failed["param"] == "out"


def test_generation_settings_that_contradict_each_other(tmp_path: Path, data: Path) -> None:
    """B45: do_sample false with a temperature ended other trainers' runs at the last save."""
    model = tiny_models.make_model(tmp_path / "m")
    (model / "generation_config.json").write_text('{"do_sample": false, "temperature": 0.9, "eos_token_id": 2}')
    run = train(tmp_path / "run", model, data, epochs=1)
    told = json.loads((run.model / "generation_config.json").read_text())
    assert "temperature" not in told
    assert any("temperature" in event["message"] for event in events(run, "warning"))


def test_memory_of_validation_is_flat(tmp_path: Path, tiny: Path) -> None:
    """B47: 20 or 400 rows of about 200 tokens: the most that is held at once does not grow with them."""
    import tracemalloc

    from luthier.engine import attention

    model = models.load_base(tiny, "float32")
    attention.install(model)
    rng = np.random.default_rng(0)
    peaks = []
    for count in (20, 400):
        ids = rng.integers(5, 300, (count, 200)).astype(np.int32)
        rows = [(row, np.concatenate([[0.0], np.ones(199)]).astype(np.float32)) for row in ids]
        held: list[int] = []

        def look(done: int, total: int, held: list[int] = held) -> None:
            held.append(tracemalloc.get_traced_memory()[0])

        tracemalloc.start()
        stream.measure_rows(model, rows, 1000, progress=look)
        tracemalloc.stop()
        assert len(held) == count // 5
        peaks.append(max(held[1:]) - held[0])
    assert peaks[1] < peaks[0] + 200_000


def test_memory_that_runs_out_is_said(tmp_path: Path, tiny: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """B47: torch's own refusal of 16 terabytes in the middle of a step."""
    monkeypatch.setattr(stream, "forward_backward", lambda *_, **__: float(torch.empty(2**42).sum()))
    run = lay_out(tmp_path / "run", tiny, data, epochs=1)
    assert carry_out(run) == 1
    failed = events(run)[-1]
    assert failed["message"] == "Memory ran out." and "--micro-tokens" in failed["hint"]


# --- methods and formats --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["lora", "rslora", "dora", "pissa", "full", "freeze:1"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_every_method_learns(tmp_path: Path, tiny: Path, data: Path, method: str, precision: str) -> None:
    options: dict[str, Any] = {"rank": 8} if method in ("lora", "rslora", "dora", "pissa") else {}
    run = train(
        tmp_path / "run", tiny, data, method=method, precision=precision, epochs=6, learning_rate=5e-3, **options
    )
    assert losses(run)[-1] < 0.95 * losses(run)[0]
    from luthier.engine.models import load_for_use

    loaded = load_for_use(str(run.path), "float32")
    assert loaded.adapter == (method not in ("full", "freeze:1"))


def test_attention_dropout_of_the_base_is_turned_off_and_told(tmp_path: Path, data: Path) -> None:
    """Whether it is a number or, as in GPT-2, a layer of its own."""
    made: tuple[tuple[str, dict[str, Any]], ...] = (
        ("gpt2", {"attn_pdrop": 0.1}),
        ("llama", {"attention_dropout": 0.1}),
    )
    for family, words in made:
        model = tiny_models.make_model(tmp_path / family, family=family, **words)
        run = train(tmp_path / f"run-{family}", model, data, max_steps=1, precision="float32")
        told = [event["message"] for event in events(run, "warning")]
        assert "The base's attention dropout of 0.1 is turned off while tuning." in told


@pytest.mark.parametrize("family", ["qwen2", "mistral", "gemma3"])
def test_other_families_learn(tmp_path: Path, data: Path, family: str) -> None:
    model = tiny_models.make_model(tmp_path / "m", family=family)
    run = train(tmp_path / "run", model, data, epochs=4, learning_rate=5e-3)
    assert losses(run)[-1] < losses(run)[0]


def test_texts_and_completions(tmp_path: Path, tiny: Path) -> None:
    """Plain text is cut into windows in which every token is learnt once; completions end once."""
    text = tmp_path / "t.txt"
    text.write_text("the quick brown fox jumps over the lazy dog and so on. " * 40)
    run = train(tmp_path / "text", tiny, text, max_length=32, epochs=1)
    told = events(run, "prepared")[0]
    from luthier.data.render import Renderer

    whole = len(Renderer.load(tiny).tokenizer.plain(text.read_text())) + 1  # and the end of text
    assert told["supervised_tokens"] == whole - 1 and told["longest"] == 32
    pairs = write(tmp_path / "p.jsonl", [{"prompt": f"color {n} ->", "completion": " red"} for n in range(8)])
    run = train(tmp_path / "pairs", tiny, pairs, epochs=1)
    assert events(run, "prepared")[0]["supervised_tokens"] == 8 * (len(Renderer.load(tiny).tokenizer.plain(" red")) + 1)


def test_run_folder_is_complete(tmp_path: Path, tiny: Path, data: Path) -> None:
    run = train(tmp_path / "run", tiny, data, epochs=1, validation="0.2")
    names = {path.name for path in run.path.iterdir()}
    assert {"request.json", "spec.json", "events.jsonl", "metrics.csv", "checkpoints", "model", "report.json"} <= names
    spec = json.loads(run.spec.read_text())
    parts = "request settings base parent template stop_ids data validation kernels"
    assert set(spec) == set(parts.split())
    assert "auto" not in spec["settings"].values()
    assert set(spec["data"]["files"]) == {str(data)}
    kinds = [event["type"] for event in events(run)]
    assert kinds[0] == "started" and kinds[-1] == "finished"
    report = json.loads(run.report.read_text())
    assert report["trained_tokens"] == sum(event["tokens"] for event in events(run, "step"))
    assert report["tree_ratio"] > 1 and report["weights_changed"] is True
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        assert (run.model / name).is_file()
