"""Laws of Direct Preference Optimization: the pair's loss against a slow twin, cuts, the start that it is measured
from, what is kept of that, resuming and ranks."""

from __future__ import annotations

import copy
import json
import math
import os
import shutil
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from luthier.data.dataset import prepare
from luthier.data.render import Renderer
from luthier.engine import attention, forest, layers, models, planner, preference, references, setup, step, stream
from luthier.engine.__main__ import carry_out
from luthier.engine.forest import Row
from luthier.engine.preference import Judge, Outcome
from luthier.settings import load_settings
from luthier.spec.run import RunFolder
from tests import tiny as tiny_models
from tests.engine.runs import chats, events, lay_out, losses, preferences, process, refused, train, weights, write
from tests.engine.test_forest import FAMILIES, Gradients, same

DPO: dict[str, Any] = {"objective": "dpo", "precision": "float32", "epochs": 2, "warmup": 0.0, "learning_rate": 5e-3}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("pairs") / "pairs.jsonl", preferences(12))


@pytest.fixture(autouse=True)
def own_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LUTHIER_HOME", str(tmp_path / "home"))


def pairs_of(lengths: list[tuple[int, int]], prefix: int, seed: int) -> list[Row]:
    """Answers of these lengths; all prompts begin with `prefix` ids, and each pair has a prompt of its own."""
    rng = np.random.default_rng(seed)
    shared, rows = rng.integers(5, 300, prefix), []
    for both in lengths:
        own = rng.integers(5, 300, 6)
        for length in both:
            ids = np.concatenate([shared, own, rng.integers(5, 300, length)]).astype(np.int32)
            learnt = np.zeros(len(ids), np.float32)
            learnt[-length:] = 1
            rows.append((ids, learnt))
    return rows


# -- the formula -------------------------------------------------------------------------------------------------------


@given(st.floats(-60, 60), st.floats(-60, 60), st.floats(0.01, 2.0), st.sampled_from([0.0, 0.1, 0.3]))
def test_weights_are_the_gradient_of_the_loss(good: float, bad: float, beta: float, smoothing: float) -> None:
    """Beside autograd on the formula as the papers write it; far out too, where a naive sigmoid overflows."""
    policy = torch.tensor([good, bad], dtype=torch.float64, requires_grad=True)
    z = beta * (policy[0] - policy[1])
    wanted = -(1 - smoothing) * torch.nn.functional.logsigmoid(z) - smoothing * torch.nn.functional.logsigmoid(-z)
    wanted.backward()
    judge = Judge(beta, smoothing)
    margins = judge.margins(np.array([good, bad]), np.zeros(2))
    assert judge.losses(margins)[0] == pytest.approx(wanted.item(), rel=1e-9, abs=1e-12)
    assert policy.grad is not None
    assert judge.weights(margins) == pytest.approx(-policy.grad.numpy(), rel=1e-6, abs=1e-12)


# -- beside the slow twin ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=list(FAMILIES))
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("preference") / request.param
    options = {"family": request.param, **FAMILIES[request.param]}
    return models.load_base(tiny_models.make_model(folder, **options), "float32").eval()


def slow(model: Any, rows: list[Row], reference: np.ndarray, judge: Judge) -> tuple[float, Gradients]:
    """Each answer alone through transformers' own forward; the mean loss as written, by autograd."""
    model.zero_grad(set_to_none=True)
    sums = []
    for ids, learnt in rows:
        tokens = torch.tensor(ids.tolist(), device=model.device)[None]
        logits = model(input_ids=tokens, use_cache=False).logits[0, :-1].double()
        each = logits.log_softmax(-1).gather(1, tokens[0, 1:, None])[:, 0]
        sums.append((each * torch.from_numpy(learnt[1:]).to(model.device)).sum())
    gained = torch.stack(sums) - torch.from_numpy(reference).to(model.device)
    z = judge.beta * (gained[0::2] - gained[1::2])
    e = judge.smoothing
    loss = (-(1 - e) * torch.nn.functional.logsigmoid(z) - e * torch.nn.functional.logsigmoid(-z)).mean()
    loss.backward()
    return loss.item(), gradients(model)


def gradients(model: Any) -> Gradients:
    return {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}


def fast(model: Any, rows: list[Row], reference: np.ndarray, judge: Judge, budget: int) -> tuple[float, Gradients]:
    model.zero_grad(set_to_none=True)
    outcome = Outcome()
    for _, work in planner.works(rows, budget, trunks=step.branches(model), each=2):
        preference.forward_backward(model, work, reference, judge, len(rows) // 2, outcome)
    assert outcome.pairs == len(rows) // 2
    return outcome.loss / outcome.pairs, gradients(model)


@pytest.mark.parametrize("head", [True, False], ids=["head-learns", "head-frozen"])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_a_step_is_that_of_the_answers_alone(
    model: Any, head: bool, smoothing: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one forest, cut into several, and behind a trunk that predicts first tokens; by transformers and fused."""
    monkeypatch.setattr(planner, "MIN_SAVED", 8)
    twin = copy.deepcopy(model)
    judge = Judge(0.3, smoothing)
    rows = pairs_of([(5, 9), (1, 14), (7, 7), (12, 2), (3, 3)], prefix=40, seed=1)
    rows += [rows[4], rows[5]]  # a pair twice
    reference = np.linspace(-60, -20, len(rows))
    for each in (twin, ours := copy.deepcopy(model)):
        each.get_output_embeddings().weight.requires_grad_(head)
        each.get_input_embeddings().weight.requires_grad_(head)
    wanted = slow(twin, rows, reference, judge)
    attention.install(ours)
    for fused in (False, True):
        if fused:
            assert layers.fuse(ours) is None
        for budget in (10_000, 120, 1):
            same(wanted, fast(ours, rows, reference, judge, budget), 3e-5)
    assert any(work.trunk for _, work in planner.works(rows, 120, each=2))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 30), st.integers(1, 30)), min_size=1, max_size=9), st.integers(1, 150))
def test_both_answers_lie_in_one_forest(shapes: list[tuple[int, int]], budget: int) -> None:
    """Whatever the budget; each pair once, and no forest is larger than it may be (but for what rows share that is too
    short to be worth it)."""
    rows = pairs_of(shapes, prefix=20, seed=2)
    works = [work for _, work in planner.works(rows, budget, each=2)]
    found = [pair for work in works for tree in work.forests for pair in np.unique(tree.sequences // 2)]
    assert sorted(found) == list(range(len(shapes)))
    for work in works:
        for tree in work.forests:
            assert set(np.unique(tree.sequences)) == {2 * n + side for n in tree.sequences // 2 for side in (0, 1)}
            count = len(np.unique(tree.sequences))
            assert count == 2 or tree.tokens <= budget + count * forest.MIN_SHARED


# -- runs --------------------------------------------------------------------------------------------------------------


def test_the_cut_changes_nothing(tmp_path: Path, tiny: Path, data: Path) -> None:
    runs = [
        train(tmp_path / f"m{budget}", tiny, data, micro_tokens=budget, label_smoothing=0.1, **DPO)
        for budget in (1, 90, 4096)
    ]
    for run in runs[1:]:
        assert losses(run) == pytest.approx(losses(runs[0]), abs=2e-5)


@pytest.mark.parametrize("method", ["lora", "dora", "pissa", "full"])
def test_preferred_answers_become_likelier(tmp_path: Path, tiny: Path, data: Path, method: str) -> None:
    """From ln 2 down, all pairs ranked at the end; held-out pairs, events, table and report say so."""
    rate = 2e-2 if method != "full" else 2e-3
    options: dict[str, Any] = {**DPO, "epochs": 8, "method": method, "learning_rate": rate}
    run = train(tmp_path / "run", tiny, data, validation="0.25", **options)
    steps, held = events(run, "step"), events(run, "validation")
    assert steps[0]["loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert abs(steps[0]["preference"]["reward_margin"]) < 1e-4
    assert steps[-1]["loss"] < 0.2 and steps[-1]["preference"]["reward_accuracy"] == 1.0
    assert steps[-1]["token_accuracy"] is None
    assert held[0]["step"] == 0 and held[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    report = json.loads(run.report.read_text())
    assert report["tuned"]["rows"] == 3
    assert report["tuned"]["preference_accuracy"] == held[-1]["preference"]["preference_accuracy"]
    header, *lines = run.metrics.read_text().splitlines()
    assert header.endswith("reward_accuracy,reward_margin") and len(lines) == len(steps)
    assert lines[-1].split(",")[-2] == "1.0"


def test_a_full_batch_beside_the_formula(tmp_path: Path, tiny: Path, data: Path) -> None:
    """The loss of a later step is what the saved weights give by the formula: rows alone, start and model apart."""
    run = train(tmp_path / "run", tiny, data, batch_size=12, beta=0.5, **{**DPO, "schedule": "constant"})
    rows = list(prepare([data], Renderer.load(tiny), max_length=512, pairs=True).rows)
    half = train(tmp_path / "half", tiny, data, batch_size=12, beta=0.5, max_steps=1, **{**DPO, "schedule": "constant"})

    def log_probs(model: Any) -> np.ndarray:
        sums = []
        for ids, learnt in rows:
            tokens = torch.tensor(ids.tolist())[None]
            with torch.no_grad():
                logits = model(input_ids=tokens, use_cache=False).logits[0, :-1].double()
            each = logits.log_softmax(-1).gather(1, tokens[0, 1:, None])[:, 0]
            sums.append(float((each * torch.from_numpy(learnt[1:])).sum()))
        return np.array(sums)

    tuned, base = (log_probs(models.load_for_use(str(f), "float32").model) for f in (half.path, tiny))
    gained = (tuned - base).reshape(-1, 2)
    wanted = float(np.logaddexp(0, -0.5 * (gained[:, 0] - gained[:, 1])).mean())
    assert losses(run)[1] == pytest.approx(wanted, abs=1e-5)
    assert losses(run)[0] == pytest.approx(math.log(2), abs=1e-6)


def test_going_on_from_a_supervised_adapter(tmp_path: Path, tiny: Path, data: Path) -> None:
    """B35: measured from that adapter, not from the base, and without its dropout; the start stays what it was."""
    file = write(tmp_path / "chats.jsonl", chats(12))
    options = {name: value for name, value in DPO.items() if name != "objective"}
    parent = train(tmp_path / "parent", tiny, file, dropout=0.3, **options)
    run = train(tmp_path / "run", tiny, data, continue_from=str(parent.path), **DPO)
    first = events(run, "step")[0]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-4) and first["preference"]["reward_margin"] < 1e-5
    assert losses(run)[-1] < first["loss"]
    kept = sorted((load_settings().cache_dir / "references").glob("*.jsonl"))
    assert len(kept) == 1
    plain = train(tmp_path / "plain", tiny, data, **DPO)
    other = set((load_settings().cache_dir / "references").glob("*.jsonl")) - set(kept)
    assert len(other) == 1, "the base is another start"
    values = [json.loads(path.read_text())["log_probs"] for path in (kept[0], other.pop())]
    assert not np.allclose(*values, atol=0.1) and losses(plain)[0] == pytest.approx(math.log(2), abs=1e-4)
    rows = list(prepare([data], Renderer.load(tiny), max_length=512, pairs=True).rows)
    start = models.load_for_use(str(parent.path), "float32").model
    attention.install(start.get_base_model())
    assert stream.row_log_probs(start, rows, 2048) == pytest.approx(values[0], abs=1e-4)


# -- what is kept of the start -----------------------------------------------------------------------------------------


def references_of(run: RunFolder) -> Path:
    [place] = (load_settings().cache_dir / "references").glob("*.jsonl")
    return place


def test_kept_is_computed(tmp_path: Path, tiny: Path, data: Path) -> None:
    """Runs of other seeds, ranks and rates take what the first one computed, and come to the same bits as without."""
    first = train(tmp_path / "first", tiny, data, **DPO)
    place = references_of(first)
    before = place.read_bytes()
    with mock.patch.object(references.stream, "row_log_probs", side_effect=AssertionError("computed again")):
        again = train(tmp_path / "again", tiny, data, **DPO)
        train(tmp_path / "other", tiny, data, **{**DPO, "seed": 8, "rank": 4, "learning_rate": 1e-4})
    place.write_bytes(before[: len(before) // 2])  # a write that was cut off
    anew = train(tmp_path / "anew", tiny, data, **DPO)
    for run in (again, anew):
        assert {name: value.tolist() for name, value in weights(run).items()} == {
            name: value.tolist() for name, value in weights(first).items()
        }
    assert place.read_bytes().splitlines()[-1] == before.splitlines()[-1]


def test_a_chunk_does_not_depend_on_its_run(tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunk by chunk in any order of knowledge: a run that knows some of them has the same numbers."""
    monkeypatch.setattr(references, "CHUNK", 4)
    file, part = write(tmp_path / "all.jsonl", preferences(10)), write(tmp_path / "part.jsonl", preferences(4, 4))
    train(tmp_path / "part", tiny, part, max_steps=1, **DPO)
    train(tmp_path / "all", tiny, file, max_steps=1, **DPO)
    entries = [json.loads(line) for line in references_of(RunFolder(tmp_path / "all")).read_text().splitlines()]
    assert len(entries) == 3, "the middle chunk was known"
    shutil.rmtree(load_settings().cache_dir / "references")
    train(tmp_path / "anew", tiny, file, max_steps=1, **DPO)
    anew = [json.loads(line) for line in references_of(RunFolder(tmp_path / "anew")).read_text().splitlines()]
    assert {entry["rows"]: entry["log_probs"] for entry in entries} == {
        entry["rows"]: entry["log_probs"] for entry in anew
    }


@pytest.mark.parametrize(("there", "left"), [(0, 1), (5, 6), (9, 10), (10, 10), (12, 10)])
def test_only_the_oldest_starts_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there: int, left: int) -> None:
    monkeypatch.setattr(references, "KEPT_FILES", 10)
    for n in range(there):
        (tmp_path / f"{n}.jsonl").write_text("{}\n")
        os.utime(tmp_path / f"{n}.jsonl", (n, n))
    references._keep(tmp_path / "new.jsonl", "rows", np.zeros(2))
    names = {path.stem for path in tmp_path.glob("*.jsonl")}
    assert names == {"new", *map(str, range(there - left + 1, there))}


def test_other_numbers_are_another_start(tmp_path: Path, tiny: Path, data: Path) -> None:
    for name, options in {"a": {}, "b": {"precision": "bfloat16"}, "c": {"method": "dora"}}.items():
        train(tmp_path / name, tiny, data, max_steps=1, **{**DPO, **options})
    assert len(list((load_settings().cache_dir / "references").glob("*.jsonl"))) == 3


# -- resuming, ranks, seeds --------------------------------------------------------------------------------------------


def test_resumed_is_uninterrupted(tmp_path: Path, tiny: Path, data: Path) -> None:
    """To the bit, also where what was kept of the start is gone."""
    options = {**DPO, "checkpoint_every": 1, "validation": "0.25"}
    whole = train(tmp_path / "whole", tiny, data, **options)
    run = lay_out(tmp_path / "run", tiny, data, **options)
    emit = RunFolder.emit

    def stopping(self: RunFolder, type: str, **fields: Any) -> None:
        emit(self, type, **fields)
        if type == "step" and fields["step"] == 2:
            self.ask_to_stop()

    with mock.patch.object(RunFolder, "emit", stopping):
        assert carry_out(run) == 0
    assert events(run)[-1]["type"] == "stopped"
    shutil.rmtree(load_settings().cache_dir / "references")
    assert carry_out(run) == 0
    assert losses(run) == losses(whole)
    assert {n: v.tolist() for n, v in weights(run).items()} == {n: v.tolist() for n, v in weights(whole).items()}
    assert len(run.metrics.read_text().splitlines()) == 1 + len(losses(whole))


def test_two_ranks_take_the_steps_of_one(tmp_path: Path, tiny: Path) -> None:
    data = write(tmp_path / "pairs.jsonl", preferences(150))  # three chunks of references
    options = {**DPO, "epochs": 1, "micro_tokens": 90, "batch_size": 30, "validation": "0.1"}
    one = train(tmp_path / "one", tiny, data, **options)
    shutil.rmtree(load_settings().cache_dir / "references")
    two = lay_out(tmp_path / "two", tiny, data, **options)
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    running = process(two, *launch)
    assert running.wait(timeout=300) == 0, two.log.read_text()[-2000:]
    assert losses(two) == pytest.approx(losses(one), abs=1e-5)
    for name in ("loss", "preference"):
        last = [events(run, "validation")[-1][name] for run in (one, two)]
        assert last[0] == pytest.approx(last[1], abs=1e-5)
    kept = [json.loads(line) for line in references_of(two).read_text().splitlines()]
    assert len({entry["rows"] for entry in kept}) == len(kept) >= 3


def test_seeds(tmp_path: Path, tiny: Path, data: Path) -> None:
    """B34: the same seed, the same bytes; another one, others."""
    made = [train(tmp_path / str(n), tiny, data, **DPO, seed=seed) for n, seed in enumerate((7, 7, 8))]
    files = [(run.model / "adapter_model.safetensors").read_bytes() for run in made]
    assert files[0] == files[1] != files[2]


# -- what is refused ---------------------------------------------------------------------------------------------------


def test_a_forecast_and_its_parts(tmp_path: Path, tiny: Path, data: Path) -> None:
    run = train(tmp_path / "run", tiny, data, **DPO)
    [told] = events(run, "forecast")
    assert told["rows"] == 12 and told["reference_seconds"] > 0
    again = train(tmp_path / "again", tiny, data, **DPO)
    assert events(again, "forecast")[0]["reference_seconds"] == 0


def test_chats_are_no_pairs(tmp_path: Path, tiny: Path, data: Path) -> None:
    failed = refused(tmp_path / "run", tiny, write(tmp_path / "chats.jsonl", chats(4)), **DPO)
    assert "found a chat record, wanted a preference record" in failed["message"]
    failed = refused(tmp_path / "other", tiny, data)
    assert "--objective dpo" in failed["problems"][0]["hint"]


def test_setup_is_of_pairs(tmp_path: Path, tiny: Path, data: Path) -> None:
    run = lay_out(tmp_path / "run", tiny, data, **DPO)
    ready = setup.make_ready(run, setup.agreement.request_of(run), setup.silent, None)
    assert ready.rows == 12 and len(ready.train) == 24 and ready.settings.beta == 0.1
    assert ready.settings.steps == 6
