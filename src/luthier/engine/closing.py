"""What the end of a run will take: the proof and the forgetting meter, from how fast this machine generates.

One more token for each of b rows takes a + b / rate seconds; both are fitted to a few steps of decoding that are timed
with the run's own base and kept as micro-batches are (pace.py). Prompts and choices are reckoned as forward passes.
What is asked follows from the forecast alone, so a run that goes on asks the same.
Does not know: how answers are judged.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from luthier.engine import forget, generate, learning, planner, step
from luthier.engine.evaluate import MICRO_TOKENS, MOST_TOKENS, SPARE_TOKENS
from luthier.engine.pace import Known, Point, Price, Size
from luthier.engine.prove import FIRST, LATENCY_ROWS, MOST_LABELS, MOST_ROWS
from luthier.engine.setup import Ready
from luthier.proof import probe
from luthier.spec.job import TrainRequest
from luthier.spec.keeping import ITEMS

PROOF_SHARE = 1 / 3  # of the training time that a proof may take by default
METER_SHARE = 1 / 6  # of the training time that the forgetting meter may take by default
FEWEST, MOST = 60, 400  # items; fewer say nothing, more make the interval hardly narrower
ROUND = 20  # items are counted in such steps, so that runs of one kind ask the same and the base's scores are known
GATED = 150  # items when a threshold asks for the number, whatever it takes
TIMED_ROWS = (8, generate.BATCH_SIZE)  # rows decoded together when that is timed
TIMED_STEPS = 6
TIMED_PROMPT = 32  # tokens


@dataclass(frozen=True, slots=True)
class Closing:
    """`measured`: decoding was timed for this forecast."""

    prove_seconds: float = 0.0
    curve_seconds: float = 0.0
    forget_seconds: float = 0.0
    probe_items: int = 0
    measured: bool = False


def foretell(
    ready: Ready, known: Known, forward: Price, train_seconds: float, published: int, heed: Callable[[], None]
) -> Closing:
    """`published`: checkpoints that are kept as models. Raises what `heed` raises."""
    request = ready.request
    proven = (ready.validation is not None or request.proof_data is not None) and request.proof_rows != 0
    if not proven and request.forgetting == "off":
        return Closing()
    measured = not known.has("decode")
    if measured:
        known.add(time_decoding(ready, heed))
    pace = Pace(known, forward)
    load = ready.base_seconds * (1 if request.uses_adapter else 2)
    proof = _proof(ready, pace, load, train_seconds) if proven else 0.0
    items, meter = _meter(ready, pace, load, train_seconds)
    curve = _curve(ready, pace, train_seconds, published) if proven else 0.0
    return Closing(proof, curve, meter, items, measured)


def items_worth(request: TrainRequest, train_seconds: float, load: float, per_item: float) -> int:
    """How many items of the probe to ask of both models, 0 for none, when an item takes `per_item` seconds of both."""
    if request.forgetting == "off":
        return 0
    if request.forgetting != "auto":
        return request.forgetting
    room = max(0.0, train_seconds * METER_SHARE - load)
    worth = int(min(MOST, room / per_item)) // ROUND * ROUND
    if request.keep_general:
        worth = max(ITEMS, worth)
    if request.max_forgetting is not None:
        return max(GATED, worth)
    return worth if worth >= FEWEST else 0


@dataclass(frozen=True, slots=True)
class Pace:
    """Seconds of the two things that asking is made of."""

    known: Known
    forward: Price

    def read(self, tokens: Sequence[int]) -> float:
        """Rows of so many tokens each, read once in one pass."""
        pairs = sum(count * (count + 1) // 2 for count in tokens)
        return self.known.seconds(self.forward.of(Size(sum(tokens), len(tokens), pairs)), "forward")

    def write(self, tokens: Sequence[int]) -> float:
        """So many tokens for each row of a batch, decoded together; a row that is done leaves."""
        start, rate = self.known.line("decode")
        return max(tokens, default=0) * start + sum(tokens) / rate

    def answer(self, prompts: Sequence[int], answers: Sequence[int], batch: int = generate.BATCH_SIZE) -> float:
        """Prompts of these lengths answered with so many tokens each, in batches."""
        starts = range(0, len(prompts), batch)
        return sum(self.read(prompts[at : at + batch]) + self.write(answers[at : at + batch]) for at in starts)


# -- the proof ---------------------------------------------------------------------------------------------------------


def _proof(ready: Ready, pace: Pace, load: float, train_seconds: float) -> float:
    rows = ready.validation or ready.train  # rows of a file of their own are taken to be like these, and many
    count = len(set(rows.places)) if ready.request.proof_data is None else MOST_ROWS
    if rows.text or rows.sides > 1:
        asked = count if ready.request.proof_rows == "auto" else min(count, ready.request.proof_rows)
        lengths = [rows.length(n) for n in range(len(rows))]
        passes = sum(pace.read(lengths[at : at + rows.sides]) for at in range(0, len(lengths), rows.sides))
        return load + 2 * passes * min(asked, MOST_ROWS) / count
    prompts, answers, labels = _lengths(rows)
    most = min(MOST_TOKENS, max(answers) + SPARE_TOKENS)

    def ways(picked: Sequence[int]) -> list[tuple[list[int], list[int]]]:
        """(prompts, answers) of each way: the tuned model ends as the references do, the base tends to write on, and
        with examples before it it does one or the other."""
        own, wanted = [prompts[n] for n in picked], [answers[n] for n in picked]
        longer = [n + ready.request.proof_examples * (m + n) for n, m in zip(own, wanted, strict=True)]
        found = [(own, wanted), (own, [most] * len(own))]
        return found + ([(longer, [(n + most) // 2 for n in wanted])] if ready.request.proof_examples else [])

    def seconds(asked: int, batch: int) -> float:
        picked = [n % len(prompts) for n in range(min(asked, len(prompts)))]
        told = sum(pace.answer(*way, batch) for way in ways(picked))
        if labels:
            told += sum(pace.read([n + labels]) for way, _ in ways(picked) for n in way)
        return told * asked / max(1, len(picked))

    if ready.request.proof_rows != "auto":
        return load + seconds(min(count, int(ready.request.proof_rows)), generate.BATCH_SIZE)
    alone = LATENCY_ROWS * sum(pace.answer(*way) for way in ways([0]))
    least = seconds(min(FIRST, count), FIRST) + alone
    whole = seconds(min(MOST_ROWS, count), generate.BATCH_SIZE) + alone
    return max(load + least, min(train_seconds * PROOF_SHARE, load + whole))


def _curve(ready: Ready, pace: Pace, train_seconds: float, published: int) -> float:
    rows = ready.validation
    if rows is None or rows.text or rows.sides > 1 or published < 2:
        return 0.0
    prompts, answers, labels = _lengths(rows)
    per_row = (pace.answer(prompts, answers) + (sum(pace.read([n + labels]) for n in prompts) if labels else 0)) / len(
        rows
    )
    count = learning.rows_worth(published, train_seconds, ready.base_seconds, per_row, len(set(rows.places)))
    return published * (ready.base_seconds + count * per_row) if count else 0.0


def _lengths(rows: Any) -> tuple[list[int], list[int], int]:
    """(tokens of each prompt, of each answer, of all labels together: 0 unless the answers are few distinct ones)."""
    prompts, answers, labels = [], [], set()
    for ids, weights in rows:
        first = int(np.argmax(weights >= 1))
        prompts.append(first)
        answers.append(len(ids) - first)
        labels.add(ids[first:].tobytes())
    few = len(labels) <= MOST_LABELS and len(rows) >= 3 * len(labels)
    return prompts, answers, sum(len(label) // 4 for label in labels) if few else 0


# -- the meter ---------------------------------------------------------------------------------------------------------


def _meter(ready: Ready, pace: Pace, load: float, train_seconds: float) -> tuple[int, float]:
    """(items, seconds)."""
    if ready.request.forgetting == "off":
        return 0, 0.0
    sampled = probe.sample(probe.general(), MOST)
    both = 2 * _asking(ready, pace, sampled)
    items = items_worth(ready.request, train_seconds, load, both / len(sampled))
    if not items:
        return 0, 0.0
    return items, load + 2 * _asking(ready, pace, probe.sample(probe.general(), items))


def _asking(ready: Ready, pace: Pace, items: Sequence[probe.Item]) -> float:
    """Seconds of `items`, asked of one model."""
    rows = [forget.row_of(ready.renderer, *pair) for item in items for pair in item.pairs]
    planned = planner.works(rows, MICRO_TOKENS, trunks=step.branches(ready.model))
    sizes = [Size.of(*work.all) for _, work in planned]
    seconds = sum(pace.known.seconds(pace.forward.of(size), "forward") for size in sizes)
    for room, tasks in forget.tasks_of(ready.renderer, items, generate.context_of(ready.model)).items():
        # An answer may end at once or fill its room; some row of a batch comes close to that.
        answers = [room if n % generate.BATCH_SIZE == 0 else room // 2 for n in range(len(tasks))]
        seconds += pace.answer([len(prompt) for _, prompt in tasks], answers)
    return seconds


# -- timing ------------------------------------------------------------------------------------------------------------


def time_decoding(ready: Ready, heed: Callable[[], None]) -> list[Point]:
    """A few steps of decoding, for batches of two sizes; greedy, so nothing random is drawn."""
    rows = ready.validation or ready.train
    prompts = [rows[n % len(rows)][0][:TIMED_PROMPT].tolist() for n in range(max(TIMED_ROWS))]
    points = []
    for batch in TIMED_ROWS:
        heed()
        ends: list[float] = []
        generate.generate(
            ready.model,
            prompts[:batch],
            [],
            ready.renderer.tokenizer.pad_id,
            generate.Sampling(max_tokens=TIMED_STEPS),
            context=generate.context_of(ready.model),
            batch_size=batch,
            on_token=lambda *_, ends=ends: ends.append(time.monotonic()),
        )
        steps = ends[batch - 1 :: batch]
        points.append(Point("decode", batch, (steps[-1] - steps[0]) / (len(steps) - 1), TIMED_PROMPT))
    return points
