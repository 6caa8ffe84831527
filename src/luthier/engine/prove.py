"""The same held-out rows answered by the base, by the base with examples in its prompt, and by the tuned model.

With a time to keep to, rows are asked in rounds that grow, in an order that follows from the seed, so what is measured
is a fair sample whatever the pace of the machine. Judging is the proof room's (proof/judge.py).
Does not know: run folders, how a model was trained.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from luthier.data.render import Unrenderable
from luthier.data.rows import parts
from luthier.engine import adapters, catalogue, embed, install, models, step, stream
from luthier.engine.answers import Answer, Asker, Memory, Question, answer_of, asked_of, cost
from luthier.engine.forest import Row
from luthier.proof import choose, classes, judge
from luthier.proof.metrics import Metric, Scored, mean
from luthier.proof.neighbours import Neighbours, cut, with_examples
from luthier.settings import load_settings
from luthier.spec.data import Chat, Completion, Example, Preference, Text
from luthier.spec.errors import LuthierError
from luthier.spec.proof import EXAMPLES, Proof, ProofRow, WayName

FIRST = 8  # rows of the first round, and the fewest of a proof that has a time to keep to
GROWTH = 4  # a round brings at most this many times the rows so far
MOST_ROWS = 500  # by default: an interval of a share is then at most 9 points wide, and a report stays small
LATENCY_ROWS = 3
MOST_LABELS = 12  # whose probabilities are measured
MICRO_TOKENS = 2048
SHOWN = 200  # characters of what is measured but not answered

Tell = Callable[[str], None]
Progress = Callable[[str, int, int], None]  # (what, done, total)


@dataclass(frozen=True, slots=True)
class Untuned:
    """The base to compare with: `open` gives the model for as long as its context lasts."""

    open: Callable[[], AbstractContextManager[Any]]
    hash: str


@dataclass(frozen=True, slots=True)
class Plan:
    """What a proof is to be. `rows`: how many, None for all; `seconds`: how long it may take, None for any time, which
    is kept to from the ninth row on."""

    metric: str | Metric = "auto"
    rows: int | None = None
    seconds: float | None = None
    examples: int = EXAMPLES
    seed: int = 0
    memory: Path | None = None  # where answers are remembered
    why_seconds: str = "the time that was given"


@dataclass(slots=True)
class _Way:
    """One way to answer, with what it has answered so far."""

    name: WayName
    open: Callable[[], AbstractContextManager[Any]]
    memory: Memory | None
    asked: list[Question] = field(default_factory=list)
    answers: list[Answer] = field(default_factory=list)
    latency: float | None = None


def prove(
    loaded: models.Loaded,
    asker: Asker,
    questions: Sequence[Question],
    plan: Plan,
    *,
    base: Untuned | None,
    known: Sequence[Example] = (),
    progress: Progress | None = None,
    tell: Tell,
) -> Proof:
    """The proof over `questions`. `known` are training rows: they are shown in prompts, and help to choose the metric.

    Raises BadSetting for a metric that the references cannot have, UserError kin of a user's grader, and whatever
    `asker.heed` raises.
    """
    begun = time.monotonic()
    references = [question.wanted for question in questions]
    if isinstance(plan.metric, Metric):
        metric, why = plan.metric, "Given with the command."
    else:
        metric, why = choose.choose(plan.metric, references, [_learnt(example) for example in known])
    order = sorted(range(len(questions)), key=lambda n: _draw(plan.seed, questions[n]))
    prover = _Prover(loaded, asker, questions, order, plan, base, known, metric, progress, tell)
    prover.go(begun)
    proof = prover.judged(metric, why)
    proof.seconds = round(time.monotonic() - begun, 3)
    return proof


class _Prover:
    """Asks every way the next rows of the order, as many as there is time for."""

    def __init__(
        self,
        loaded: models.Loaded,
        asker: Asker,
        questions: Sequence[Question],
        order: Sequence[int],
        plan: Plan,
        base: Untuned | None,
        known: Sequence[Example],
        metric: Metric,
        progress: Progress | None,
        tell: Tell,
    ) -> None:
        self.asker, self.plan, self.progress, self.tell = asker, plan, progress, tell
        self.order, self.questions = order, [questions[n] for n in order]
        self.limit = min(len(questions), plan.rows if plan.rows is not None else len(questions))
        self.rows: list[ProofRow] = []
        self.labels: list[str] = []
        if metric.name == "classification":
            labels = classes.labels_of([question.wanted for question in questions])
            self.labels = labels if len(labels) <= MOST_LABELS else []
        self.neighbours = Neighbours(known, plan.seed) if base and known and plan.examples else None
        tuned = _remember(plan.memory, f"{loaded.base_hash} {weights_hash(loaded.folder)}", loaded.model)
        self.ways = [_Way("tuned", lambda: contextlib.nullcontext(loaded.model), tuned)]
        if base is not None:
            remembered = _remember(plan.memory, base.hash, loaded.model)
            names: list[WayName] = ["base", "examples"] if self.neighbours else ["base"]
            self.ways += [_Way(name, base.open, remembered) for name in names]

    def go(self, begun: float) -> None:
        """Ask until all rows are answered or the time is up."""
        seconds = self.plan.seconds
        self._more(self.limit if seconds is None else min(self.limit, FIRST))
        pace = self._pace(begun, 0)
        for way in self.ways:
            with way.open() as model:
                way.latency = self.asker.latency(model, [asked.prompt for asked in way.asked[:LATENCY_ROWS]])
        while seconds is not None and len(self.rows) < self.limit:
            room = int((seconds - (time.monotonic() - begun)) / pace)
            if room < 1:
                break
            started, before = time.monotonic(), len(self.rows)
            self._more(min(room, (GROWTH - 1) * before, self.limit - before))
            pace = self._pace(started, before)

    def _pace(self, started: float, before: int) -> float:
        """Seconds a row since `started`, when there were `before` rows. Answers that were remembered count with what
        they took once: those of the next rows may not be."""
        spared = sum(answer.seconds for way in self.ways for answer in way.answers[before:] if answer.cached)
        return max(1e-6, time.monotonic() - started + spared) / max(1, len(self.rows) - before)

    def _more(self, count: int) -> None:
        """The next `count` rows, answered every way."""
        fresh = self.questions[len(self.rows) : len(self.rows) + count]
        rows = [
            ProofRow(row=question.example.row, prompt=asked_of(question.example), wanted=question.wanted)
            for question in fresh
        ]
        shown = self.neighbours.nearest([each.example for each in fresh], self.plan.examples) if self.neighbours else []
        for way in self.ways:
            asked = list(fresh) if way.name != "examples" else list(map(self._fitted, fresh, shown))
            with way.open() as model:
                answers = self.asker.ask(model, [each.prompt for each in asked], way.memory, self._bar(way.name))
                chances = self._chances(model, asked)
            for row, each, answer, chance in zip(rows, asked, answers, chances, strict=True):
                row.answers[way.name] = self._read(way.name, each, answer)
                if chance is not None:
                    row.chances[way.name] = chance
            way.asked += asked
            way.answers += answers
        self.rows += rows

    def _read(self, way: WayName, asked: Question, answer: Answer) -> str:
        said = answer_of(self.asker.renderer, asked.example, answer.ids)
        plain = way == "examples" and isinstance(asked.example, Completion)
        return cut(said, asked.wanted) if plain else said

    def _fitted(self, question: Question, shown: Sequence[Chat | Completion]) -> Question:
        """The question with as many of `shown`, nearest first, as the model can read and the template can say."""
        for count in range(len(shown), 0, -1):
            example = with_examples(question.example, shown[:count])
            try:
                asked = self.asker.renderer.question(example)
            except Unrenderable:
                continue
            if asked is not None and len(asked[0]) + self.asker.sampling.max_tokens <= self.asker.context:
                return Question(example, asked[0], question.wanted)
        return question

    def _chances(self, model: Any, asked: Sequence[Question]) -> list[list[float] | None]:
        """Probability of each label, among the labels, as each question's whole answer."""
        if not self.labels:
            return [None] * len(asked)
        rows: list[Row] = []
        for question in asked:
            for label in self.labels:
                rendered = self.asker.renderer.rows(_answered(question, label))[-1]
                rows.append((np.asarray(rendered.ids, np.int32), np.asarray(rendered.weights, np.float32)))
        with step.forests(model):
            scores = stream.row_log_probs(model, rows, MICRO_TOKENS).reshape(len(asked), -1)
        shares = np.exp(scores - scores.max(axis=1, keepdims=True))
        return [list(map(float, row)) for row in shares / shares.sum(axis=1, keepdims=True)]

    def _bar(self, way: WayName) -> Callable[[int, int], None] | None:
        if (tell := self.progress) is None:
            return None
        what = f"Answers of {judge.NAMES[way] if way != 'tuned' else 'the tuned model'}"
        return lambda done, total: tell(what, done, total)

    def judged(self, metric: Metric, why: str) -> Proof:
        order = sorted(range(len(self.rows)), key=lambda n: self.order[n])  # as the file has them
        rows = [self.rows[n] for n in order]
        scored = judge.score_answers(metric, rows, [self.questions[n].example for n in order])
        if metric.name == "text":
            scored = self._with_likeness(rows, scored)
        costs = {
            way.name: cost([each.prompt for each in way.asked], way.answers, way.latency)
            for way in self.ways
            if way.answers
        }
        return judge.judge(
            metric,
            why,
            rows,
            scored,
            held_out=len(self.questions),
            chosen=self._chosen(),
            seed=self.plan.seed,
            examples=self.plan.examples if self.neighbours else 0,
            costs=costs,
        )

    def _with_likeness(self, rows: Sequence[ProofRow], scored: dict[WayName, Scored]) -> dict[WayName, Scored]:
        """How near answers are to their references in meaning, by the states of the base (of the only model there is,
        without one)."""
        tokenizer = self.asker.renderer.tokenizer
        with self.ways[-1].open() as model:

            def states(texts: Sequence[str]) -> Tensor:
                return embed.mean_states(model, [tokenizer.plain(text) for text in texts], tokenizer.pad_id)

            wanted = states([row.wanted for row in rows])
            said = {way: states([row.answers[way] for row in rows]) for way in scored}
        return {way: found + {"embedding": mean(embed.likeness(said[way], wanted))} for way, found in scored.items()}

    def _chosen(self) -> str:
        asked, there = len(self.rows), len(self.questions)
        if asked == there:
            return f"All {there:,} held-out rows."
        why = f"as many as {self.plan.why_seconds} allows" if asked < self.limit else "as many as were asked for"
        return f"{asked:,} of {there:,} held-out rows, drawn by the seed {self.plan.seed}: {why}."


def _draw(seed: int, question: Question) -> bytes:
    """Where a row stands in the order: by seed and content, so that neither file order nor time matters."""
    ids = np.asarray(question.prompt, np.int32).tobytes()
    return hashlib.sha256(seed.to_bytes(8, "little") + ids + question.example.row.to_bytes(8, "little")).digest()


def _learnt(example: Example) -> str:
    """A training row's answer, to tell labels from other short answers."""
    if isinstance(example, Completion):
        return example.completion
    if isinstance(example, Text):
        return example.text
    learnt = [turn for turn in example.messages if turn.role == "assistant" and turn.weight]
    return learnt[-1].content if learnt else ""


def _answered(question: Question, label: str) -> Chat | Completion:
    """The question's example with `label` for its answer; the space that a completion begins with is kept."""
    example = question.example
    if isinstance(example, Completion):
        spaces = len(example.completion) - len(example.completion.lstrip())
        return replace(example, completion=example.completion[:spaces] + label)
    last = max(n for n, turn in enumerate(example.messages) if turn.role == "assistant" and turn.weight)
    return replace(example, messages=(*example.messages[:last], replace(example.messages[last], content=label)))


# -- what is measured, not answered ------------------------------------------------------------------------------------


def prove_texts(
    loaded: models.Loaded, texts: Sequence[tuple[Text, list[Row]]], plan: Plan, base: Untuned | None
) -> Proof:
    """The proof of plain texts: loss per token of the base and of the tuned model, a row a text."""
    whole = [(text, rows) for text, rows in texts if any((weights > 0).any() for _, weights in rows)]
    kept = whole[: plan.rows] if plan.rows is not None else whole
    rows = [
        ProofRow(
            row=text.row,
            prompt=text.text[:SHOWN],
            wanted="",
            weight=float(sum(np.count_nonzero(weights > 0) for _, weights in rows)),
        )
        for text, rows in kept
    ]
    metric, why = choose.choose("auto", [])
    windows = [rows for _, rows in kept]
    return _measured(loaded, base, plan, metric, why, rows, lambda model: _losses(model, windows), "texts", len(texts))


def prove_pairs(
    loaded: models.Loaded, pairs: Sequence[tuple[Preference, list[Row]]], plan: Plan, base: Untuned | None
) -> Proof:
    """The proof of preference pairs: by how many nats each model finds the preferred answer, as a whole, likelier than
    the other one. How often it does says less: where one kind of answer is longer, few pairs turn."""
    kept = pairs[: plan.rows] if plan.rows is not None else pairs
    rows = []
    for pair, _ in kept:
        asked, answer = parts(pair)
        rows.append(ProofRow(row=pair.row, prompt=asked[:SHOWN], wanted=answer[:SHOWN]))
    sides = [side for _, both in kept for side in both]
    metric, why = choose.METRICS["preference"], "The rows are pairs of answers."
    return _measured(loaded, base, plan, metric, why, rows, lambda model: _choices(model, sides), "pairs", len(pairs))


def _measured(
    loaded: models.Loaded,
    base: Untuned | None,
    plan: Plan,
    metric: Metric,
    why: str,
    rows: Sequence[ProofRow],
    measure: Callable[[Any], Scored],
    what: str,
    held_out: int,
) -> Proof:
    begun = time.monotonic()
    scored: dict[WayName, Scored] = {}
    if base is not None:
        with base.open() as model:
            scored["base"] = measure(model)
    scored["tuned"] = measure(loaded.model)
    chosen = f"{'All' if len(rows) == held_out else 'The first'} {len(rows):,} held-out {what}."
    proof = judge.judge(metric, why, rows, scored, held_out=held_out, chosen=chosen, seed=plan.seed)
    proof.seconds = round(time.monotonic() - begun, 3)
    return proof


def _choices(model: Any, sides: Sequence[Row]) -> Scored:
    with step.forests(model):
        sums = stream.row_log_probs(model, sides, MICRO_TOKENS, each=2).reshape(-1, 2)
    return Scored((sums[:, 0] - sums[:, 1]).tolist())


def _losses(model: Any, texts: Sequence[list[Row]]) -> Scored:
    windows = [row for rows in texts for row in rows]
    with step.forests(model):
        sums = iter(stream.row_log_probs(model, windows, MICRO_TOKENS).tolist())
    nll = [-sum(next(sums) for _ in rows) for rows in texts]
    counts = [sum(int(np.count_nonzero(weights > 0)) for _, weights in rows) for rows in texts]
    details = {
        "perplexity": math.exp(sum(nll) / sum(counts)),
        "mean_perplexity_of_texts": mean([math.exp(total / count) for total, count in zip(nll, counts, strict=True)]),
    }
    return Scored([total / count for total, count in zip(nll, counts, strict=True)], details)


# -- the models --------------------------------------------------------------------------------------------------------


def untuned(loaded: models.Loaded, base: Any, tell: Tell) -> Untuned | None:
    """The base of `loaded`: `base` when given; for an adapter the same model with the adapter switched off; for a full
    model the one that its luthier.json names, loaded now. None, with the reason told, when it cannot be had."""
    if base is not None:
        return Untuned(lambda: contextlib.nullcontext(base), "")
    if loaded.adapter:
        return Untuned(lambda: _switched_off(loaded.model), loaded.base_hash)
    found = _base_folder(loaded, tell)
    if found is None:
        return None
    folder, content = found
    dtype = str(next(loaded.model.parameters()).dtype).removeprefix("torch.")
    model = models.load_base(folder, "float32" if dtype == "float32" else "bfloat16").eval()
    model.to(next(loaded.model.parameters()).device)
    return Untuned(lambda: contextlib.nullcontext(model), content)


@contextlib.contextmanager
def _switched_off(model: Any) -> Iterator[Any]:
    with model.disable_adapter():
        yield model


def _base_folder(loaded: models.Loaded, tell: Tell) -> tuple[Path, str] | None:
    """(folder, hash) of the base of a full model; None, with the reason told, when it cannot be known or found."""
    try:
        wanted = adapters.base_of(loaded.folder)
    except LuthierError:
        tell(f"{loaded.name} does not say which base it was tuned from, so there is none to compare with.")
        return None
    where = Path(wanted.folder)
    try:
        found = where if install.is_model_folder(where) else catalogue.resolve(wanted.name, pull=False)
    except LuthierError:
        tell(f"The base {wanted.name} is not here any more ({where} is gone), so there is none to compare with.")
        return None
    if catalogue.content_hash(found) != wanted.hash:
        tell(f"{found} is no longer the base that {loaded.name} was tuned from, so there is none to compare with.")
        return None
    return found, wanted.hash


def memory_folder() -> Path:
    """Where answers are remembered, for all runs."""
    return load_settings().cache_dir / "answers"


def weights_hash(folder: Path) -> str:
    """Which weights lie in a model folder, and at which scale."""
    whole = hashlib.sha256()
    with contextlib.suppress(OSError, ValueError):
        note = json.loads((folder / adapters.NOTE).read_text(encoding="utf-8"))
        if note.get("scale", 1.0) != 1.0:
            whole.update(f"scale {note['scale']!r}".encode())
    for path in sorted(folder.glob("*.safetensors")):
        with open(path, "rb") as handle:
            whole.update(hashlib.file_digest(handle, "sha256").digest())
    return whole.hexdigest()


def _remember(folder: Path | None, name: str, model: Any) -> Memory | None:
    """Where answers of the weights `name` are kept. The same weights answer differently in another precision."""
    if folder is None or not name.strip():
        return None
    weight = next(model.parameters())
    return Memory(folder, f"{name} {weight.dtype} {weight.device.type}")
