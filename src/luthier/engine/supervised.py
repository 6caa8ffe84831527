"""What supervised rows teach: the tokens of their answers, each by its weight.

Does not know: the loop's order, files.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from luthier.engine import stream
from luthier.engine.ranks import add_up
from luthier.engine.setup import Ready, seed_everything, works_of
from luthier.engine.step import Sums, Tally
from luthier.spec.report import Score

Told = Callable[[int, int], None]  # (done, total)


class Supervised:
    """Learns and measures the rows of a run as one of its ranks; `share`: which micro-batches are this rank's."""

    def __init__(self, ready: Ready, share: slice) -> None:
        self.ready, self.share = ready, share

    def begin(self, told: Told, heed: Callable[[], None]) -> None:
        """Called once, with the weights that the run starts from."""

    def learn(self, examples: Sequence[int], step: int, between: Callable[[], None]) -> dict[str, Any]:
        """Add the gradients of a step to the masters; what the step measured, over all ranks. `between` is called after
        each piece of work."""
        ready = self.ready
        rows = ready.train.of(examples)
        normaliser = float(sum(weights.sum() for _, weights in rows))
        tokens = loss = 0.0
        tally = Tally()
        for number, work in works_of(rows, ready, self.share):
            seed_everything(ready.settings.seed, step, number)
            smoothing = ready.request.label_smoothing
            loss += stream.forward_backward(ready.model, work, normaliser, smoothing, tally, ready.masters.collect)
            tokens += work.tokens
            between()
        loss, tokens, *counts = add_up(loss, tokens, tally.tokens, tally.right, tally.rows, tally.whole)
        tally = Tally(*counts)
        return {
            "loss": loss,
            "physical_tokens": int(tokens),
            "token_accuracy": tally.token_accuracy,
            "sequence_accuracy": tally.sequence_accuracy,
            "preference": None,
        }

    def measure(self, told: Told) -> tuple[Score, dict[str, Any]]:
        """Exact held-out loss and token accuracy, sums over all rows, whatever the batches and ranks; and what the
        event says beside the loss."""
        ready, rows = self.ready, self.ready.validation
        assert rows is not None
        tally, look = Tally(), ready.classes.look(ready.model) if ready.classes else None
        sums = stream.measure_rows(
            ready.model,
            [rows[index] for index in range(len(rows))],
            ready.settings.micro_tokens,
            part=self.share,
            progress=told,
            tally=tally,
            watch=look,
            trunks=look is None,
        )
        settings = ready.settings
        classes = look.columns(rows, settings.micro_tokens, settings.max_length, self.share) if look else None
        nll, hits, weight, *counts = add_up(
            sums.nll, sums.hits, sums.weight, tally.tokens, tally.right, tally.rows, tally.whole
        )
        total, tally = Sums(nll, hits, weight), Tally(*counts)
        score = Score(
            rows=len(rows), loss=total.loss, token_accuracy=total.token_accuracy, supervised_tokens=rows.supervised
        )
        return score, {"sequence_accuracy": tally.sequence_accuracy, "classification": classes, "preference": None}
