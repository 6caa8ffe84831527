"""The end of a run: a proof of the model that was published; stopped, killed or failing, it never loses the model."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from luthier.data.render import Renderer
from luthier.engine import answers, generate, models, prove
from luthier.engine.__main__ import carry_out
from luthier.spec.data import Completion
from luthier.spec.proof import Proof
from luthier.spec.report import Report
from luthier.spec.run import RunFolder
from tests.engine.runs import chats, events, lay_out, refused, train, weights, write

LABELS = (" yes", " no")


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A memory of answers of each test's own."""
    monkeypatch.setenv("LUTHIER_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = [{"prompt": f"is {n} odd? ->", "completion": LABELS[1 - n % 2]} for n in range(40)]
    return write(tmp_path_factory.mktemp("pairs") / "pairs.jsonl", rows)


def report_of(run: RunFolder) -> Report:
    return Report.model_validate_json(run.report.read_text())


def proof_of(run: RunFolder) -> Proof:
    proof = report_of(run).proof
    assert proof is not None
    return proof


def test_a_run_ends_with_a_proof_of_what_was_published(tmp_path: Path, tiny: Path, pairs: Path) -> None:
    run = train(tmp_path / "run", tiny, pairs, epochs=2, validation="0.4", precision="float32", proof_rows=12)
    proof = proof_of(run)
    assert [way.name for way in proof.ways] == ["base", "examples", "tuned"]
    assert proof.metric == "classification"
    assert (len(proof.rows), proof.held_out) == (12, 16)
    assert proof.chosen == "12 of 16 held-out rows, drawn by the seed 7: as many as were asked for."
    records = [json.loads(line) for line in pairs.read_text().splitlines()]
    trained = {event["train_rows"] for event in events(run, "prepared")}
    assert trained == {24}
    renderer = Renderer.load(run.model)
    loaded = models.load_for_use(str(run.path), "float32")
    for row in proof.rows:
        assert (row.prompt, row.wanted) == (records[row.row - 1]["prompt"], records[row.row - 1]["completion"])
        ids = renderer.completion_prompt(row.prompt)
        tokens = max(len(renderer.tokenizer.plain(label)) for label in LABELS) + 16
        rules = generate.Sampling(max_tokens=tokens)
        said = generate.generate(loaded.model, [ids], renderer.stop_ids, 0, rules, context=512)[0]
        assert row.answers["tuned"] == answers.answer_of(renderer, Completion(row.prompt, row.wanted), said.ids)
        chances = [log_prob(loaded.model, renderer, row.prompt, f" {label}") for label in proof.classes]
        shares = torch.tensor(chances, dtype=torch.float64).softmax(0)
        assert row.chances["tuned"] == pytest.approx(shares.tolist(), abs=1e-4)
    finished = events(run, "finished")[-1]["report"]
    assert "rows" not in finished["proof"]
    assert finished["proof"]["sentence"] == proof.sentence
    page = run.page.read_text()
    assert "<script" not in page
    assert re.findall(r"(?:src|href|url)\s*[=(]", page) == []
    assert proof.sentence.split(" (")[0] in page


def log_prob(model: Any, renderer: Renderer, prompt: str, completion: str) -> float:
    """By the model's own forward, on a row of its own."""
    [row] = renderer.rows(Completion(prompt, completion))
    ids = torch.tensor([row.ids])
    with torch.no_grad():
        logs = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
    picked = logs.gather(1, ids[0, 1:, None]).squeeze(1)
    return float((picked * (torch.tensor(row.weights[1:]) > 0)).sum())


def test_what_the_examples_cost_is_counted(tmp_path: Path, tiny: Path, pairs: Path) -> None:
    run = train(tmp_path / "run", tiny, pairs, epochs=1, validation="0.2", proof_examples=2)
    costs = {way.name: way.cost for way in proof_of(run).ways}
    base, shown, tuned = (costs[name] for name in ("base", "examples", "tuned"))
    assert base is not None and shown is not None and tuned is not None
    assert base.prompt_tokens == tuned.prompt_tokens < shown.prompt_tokens
    renderer = Renderer.load(run.model)
    assert base.prompt_tokens == sum(len(renderer.completion_prompt(row.prompt)) for row in proof_of(run).rows)
    assert base.tokens_per_second is not None and base.latency is not None


@pytest.mark.parametrize("how", ["stop", "kill"])
def test_a_proof_that_was_cut_short_goes_on(
    tmp_path: Path, tiny: Path, pairs: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """The model is there already; what was answered is not asked again; the outcome is that of a run never stopped."""
    options: dict[str, Any] = {"epochs": 1, "validation": "0.4", "precision": "float32", "proof_rows": 16}
    whole = train(tmp_path / "whole", tiny, pairs, **options)
    monkeypatch.setenv("LUTHIER_HOME", str(tmp_path / "another"))
    run = lay_out(tmp_path / "run", tiny, pairs, **options)
    real, asked = answers.Asker.ask, 0

    def cut(self: answers.Asker, *given: Any, **more: Any) -> Any:
        nonlocal asked
        asked += 1
        if asked == 3 and how == "kill":
            raise KeyboardInterrupt
        if asked == 2 and how == "stop":
            run.ask_to_stop()
        return real(self, *given, **more)

    monkeypatch.setattr(answers.Asker, "ask", cut)
    if how == "kill":
        with pytest.raises(KeyboardInterrupt):
            carry_out(run)
    else:
        assert carry_out(run) == 0
        assert events(run)[-1]["type"] == "stopped"
    mine, theirs = weights(run), weights(whole)
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    assert report_of(run).proof is None
    monkeypatch.setattr(answers.Asker, "ask", real)
    assert carry_out(run) == 0
    resumed, plain = proof_of(run), proof_of(whole)
    assert [row.answers for row in resumed.rows] == [row.answers for row in plain.rows]
    assert resumed.comparisons == plain.comparisons
    tuned = resumed.way("tuned")
    assert tuned is not None and tuned.cost is not None
    assert tuned.cost.cached == 16


def test_a_proof_that_fails_leaves_the_model_and_says_so(
    tmp_path: Path, tiny: Path, pairs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> Proof:
        raise RuntimeError("out of memory somewhere")

    monkeypatch.setattr(prove, "prove", fail)
    run = train(tmp_path / "run", tiny, pairs, epochs=1, validation="0.2")
    report = report_of(run)
    assert events(run)[-1]["type"] == "finished"
    assert run.model.is_dir()
    assert report.proof is None and report.tuned is not None
    assert report.proof_note == "The proof failed: out of memory somewhere"
    assert "out of memory somewhere" in events(run, "warning")[-1]["message"]
    assert "The proof failed" in run.page.read_text()


def test_a_proof_that_ends_its_process_again_and_again_is_left_out(tmp_path: Path, tiny: Path, pairs: Path) -> None:
    run = lay_out(tmp_path / "run", tiny, pairs, epochs=1, validation="0.2")
    for _ in range(3):
        run.emit("phase", name="prove", message="")
    assert carry_out(run) == 0
    assert report_of(run).proof_note == "The proof was left out: it ended its process 3 times."


def test_a_metric_that_the_rows_cannot_have_is_refused_before_the_first_step(
    tmp_path: Path, tiny: Path, pairs: Path
) -> None:
    failed = refused(tmp_path / "run", tiny, pairs, validation="0.2", metric="numeric")
    assert (failed["code"], failed["param"]) == ("invalid_setting", "metric")
    assert "found the reference" in failed["message"]


def test_no_rows_held_out_no_proof(tmp_path: Path, tiny: Path, pairs: Path) -> None:
    for name, options in {"none": {}, "zero": {"validation": "0.2", "proof_rows": 0}}.items():
        run = train(tmp_path / name, tiny, pairs, epochs=1, **options)
        report = report_of(run)
        assert (report.proof, report.proof_note) == (None, None)
        assert "There is no proof" in run.page.read_text()


def test_time_bounds_the_rows_and_that_is_said(
    tmp_path: Path, tiny: Path, pairs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a clock on which each answer takes a second, and none else does anything."""
    clock = 0.0
    real = answers.Asker._write

    def slow(self: answers.Asker, model: Any, prompts: Any) -> Any:
        nonlocal clock
        clock += len(prompts)
        return [replace(answer, seconds=1.0) for answer in real(self, model, prompts)]

    monkeypatch.setattr(answers.Asker, "_write", slow)
    monkeypatch.setattr(prove.time, "monotonic", lambda: clock)
    renderer = Renderer.load(tiny)
    loaded = models.Loaded(models.load_base(tiny, "float32").eval(), tiny, tiny, "", False, "tiny")
    examples = [Completion(f"say {n}", f" number {n} of many, and more than a few words", row=n) for n in range(60)]
    questions = [answers.Question(each, *asked) for each in examples if (asked := renderer.question(each))]
    asker = answers.Asker(renderer, 512, generate.Sampling(max_tokens=2))
    plan = prove.Plan(seconds=30, seed=1, why_seconds="half a minute")
    proof = prove.prove(loaded, asker, questions, plan, base=None, tell=lambda _: None)
    assert len(proof.rows) == 30 - prove.LATENCY_ROWS
    assert proof.chosen == "27 of 60 held-out rows, drawn by the seed 1: as many as half a minute allows."
    again = prove.prove(loaded, asker, questions, prove.Plan(rows=27, seed=1), base=None, tell=lambda _: None)
    assert [row.row for row in again.rows] == [row.row for row in proof.rows]

    def remembering(**more: Any) -> Any:
        plan = prove.Plan(seed=1, memory=tmp_path / "answers", **more)
        return prove.prove(loaded, asker, questions, plan, base=None, tell=lambda _: None)

    remembering(rows=prove.FIRST)
    clock = 0.0
    assert len(remembering(seconds=30, why_seconds="half a minute").rows) == prove.FIRST + 30 - prove.LATENCY_ROWS
    assert clock == 30, "what the remembered rows did not take says nothing about the next"


def test_texts_are_proven_by_their_loss(tmp_path: Path, tiny: Path) -> None:
    words = ["the quick brown fox", "jumps over the lazy dog", "one two three four five"]
    data = write(tmp_path / "texts.jsonl", [{"text": f"{words[n % 3]} {n} " * 4} for n in range(20)])
    run = train(tmp_path / "run", tiny, data, epochs=2, validation="0.3", precision="float32")
    report, proof = report_of(run), proof_of(run)
    assert proof.metric == "perplexity" and not proof.higher_is_better
    for name, score in (("base", report.base), ("tuned", report.tuned)):
        way = proof.way(name)  # type: ignore[arg-type]
        assert way is not None and score is not None
        total = sum(row.scores[name] * row.weight for row in proof.rows)  # type: ignore[index]
        count = sum(row.weight for row in proof.rows)
        assert way.score == pytest.approx(total / count) == pytest.approx(score.loss, abs=1e-4)
        assert way.details["perplexity"] == pytest.approx(2.718281828 ** (total / count))
        assert count == score.supervised_tokens


def test_held_out_rows_can_be_chosen_automatically(tmp_path: Path, tiny: Path, pairs: Path) -> None:
    run = train(tmp_path / "run", tiny, pairs, epochs=1, validation="auto", proof_rows=2)
    assert events(run, "prepared")[0]["validation_rows"] == 4


def test_rows_of_several_files_are_found_again(tmp_path: Path, tiny: Path) -> None:
    files = [write(tmp_path / f"{n}.jsonl", chats(10, start=10 * n)) for n in range(2)]
    run = lay_out(tmp_path / "run", tiny, files[0], epochs=1, validation="0.3", proof_examples=1)
    request = json.loads(run.request.read_text())
    run.request.write_text(json.dumps({**request, "data": list(map(str, files))}))
    assert carry_out(run) == 0
    turns = [row["messages"] for row in chats(20)]
    said = {question["content"]: answer["content"] for question, answer in turns}
    assert {row.prompt: row.wanted for row in proof_of(run).rows}.items() <= said.items()


def test_base_answers_serve_other_runs_too(tmp_path: Path, tiny: Path, pairs: Path) -> None:
    first = train(tmp_path / "one", tiny, pairs, epochs=1, validation="0.2", proof_rows=8)
    other = train(tmp_path / "two", tiny, pairs, epochs=2, validation="0.2", proof_rows=8)
    counts: Callable[[RunFolder], dict[str, int]] = lambda run: {  # noqa: E731
        way.name: way.cost.cached for way in proof_of(run).ways if way.cost
    }
    assert counts(first) == {"base": 0, "examples": 0, "tuned": 0}
    assert counts(other) == {"base": 8, "examples": 8, "tuned": 0}
