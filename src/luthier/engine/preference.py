"""What pairs of answers teach: to find the preferred one likelier than the other, measured from where the run starts.

Direct Preference Optimization (Rafailov et al., 2023, equation 7). With p and r the log-probabilities, nats, of whole
answers under the model and under its start, a pair's margin and loss are

    z = beta * ((p_preferred - r_preferred) - (p_other - r_other))
    -(1 - e) * log sigmoid(z) - e * log sigmoid(-z)

where e is the label smoothing, the share of pairs that may be labelled the wrong way round (Mitchell, 2023). By the
chain rule this is a weighted supervised loss once p is known: each answer's tokens weigh what a nat more of it would
change. A pair's answers lie in one forest, so p is known after its forward pass, and the prompt is computed once.
Does not know: the loop's order; how log-probabilities of the start are kept (references.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor

from luthier.engine import loss as losses
from luthier.engine import references, step, stream
from luthier.engine.attention import Trunk
from luthier.engine.forest import Forest
from luthier.engine.planner import Work
from luthier.engine.ranks import add_up
from luthier.engine.setup import Ready, seed_everything, works_of
from luthier.spec.report import Score

Floats = npt.NDArray[np.float64]
Told = Callable[[int, int], None]  # (done, total)


@dataclass(frozen=True, slots=True)
class Judge:
    """Judges pairs by log-probabilities [2 B], nats: each preferred answer's, then the other's."""

    beta: float
    smoothing: float = 0.0

    def margins(self, policy: Floats, reference: Floats) -> Floats:
        """z [B]: positive where the preferred answer has gained on the other."""
        gained = (policy - reference).reshape(-1, 2)
        return np.asarray(self.beta * (gained[:, 0] - gained[:, 1]))

    def losses(self, margins: Floats) -> Floats:
        """[B], nats."""
        right, wrong = np.logaddexp(0.0, -margins), np.logaddexp(0.0, margins)  # -log sigmoid(z), -log sigmoid(-z)
        return np.asarray((1 - self.smoothing) * right + self.smoothing * wrong)

    def weights(self, margins: Floats) -> Floats:
        """[2 B]: the gradient of the summed losses by the negative log-likelihood of each answer."""
        doubt = 0.5 - 0.5 * np.tanh(margins / 2)  # sigmoid(-z)
        slope = self.beta * ((1 - self.smoothing) * doubt - self.smoothing * (1 - doubt))
        return np.stack([slope, -slope], axis=1).reshape(-1)


@dataclass(slots=True)
class Outcome:
    """Sums over pairs."""

    pairs: float = 0.0
    loss: float = 0.0
    gained: float = 0.0  # pairs with a positive margin
    margin: float = 0.0
    ranked: float = 0.0  # pairs whose preferred answer is the likelier one

    def see(self, policy: Floats, reference: Floats, judge: Judge) -> None:
        """Add pairs by log-probabilities [2 B]."""
        margins = judge.margins(policy, reference)
        self.pairs += len(margins)
        self.loss += float(judge.losses(margins).sum())
        self.gained += int((margins > 0).sum())
        self.margin += float(margins.sum())
        self.ranked += int((policy[0::2] > policy[1::2]).sum())

    def over_ranks(self) -> Outcome:
        return Outcome(*add_up(self.pairs, self.loss, self.gained, self.margin, self.ranked))

    @property
    def means(self) -> dict[str, float]:
        return {
            "reward_accuracy": self.gained / self.pairs,
            "reward_margin": self.margin / self.pairs,
            "preference_accuracy": self.ranked / self.pairs,
        }


class Preference:
    """Learns and measures the pairs of a run as one of its ranks; `share`: which micro-batches are this rank's."""

    def __init__(self, ready: Ready, share: slice) -> None:
        self.ready, self.share = ready, share
        assert ready.settings.beta is not None
        self.judge = Judge(ready.settings.beta, ready.request.label_smoothing)
        self.trained = self.held = np.zeros(0)  # log-probabilities of all rows under the start

    def begin(self, told: Told, heed: Callable[[], None]) -> None:
        """Look at all answers with the weights that the run starts from."""
        self.trained = references.of(self.ready, self.ready.train, self.share, told, heed)
        if self.ready.validation is not None:
            self.held = references.of(self.ready, self.ready.validation, self.share, told, heed)

    def learn(self, examples: Sequence[int], step: int, between: Callable[[], None]) -> dict[str, Any]:
        """Add the gradients of a step to the masters; what the step measured, over all ranks. `between` is called after
        each piece of work."""
        ready = self.ready
        rows = ready.train.of(examples)
        reference = self.trained.reshape(-1, 2)[list(examples)].reshape(-1)
        outcome, tokens = Outcome(), 0.0
        for number, work in works_of(rows, ready, self.share):
            seed_everything(ready.settings.seed, step, number)
            forward_backward(
                ready.model, work, reference, self.judge, len(examples), outcome, collect=ready.masters.collect
            )
            tokens += work.tokens
            between()
        outcome, (tokens,) = outcome.over_ranks(), add_up(tokens)
        return {
            "loss": outcome.loss / outcome.pairs,
            "physical_tokens": int(tokens),
            "token_accuracy": None,
            "sequence_accuracy": None,
            "preference": outcome.means,
        }

    def measure(self, told: Told) -> tuple[Score, dict[str, Any]]:
        """Exact held-out loss and shares, whatever the batches and ranks; and what the event says beside the loss."""
        ready, rows = self.ready, self.ready.validation
        assert rows is not None
        policy = stream.row_log_probs(
            ready.model, list(rows), ready.settings.micro_tokens, part=self.share, each=2, progress=told
        )
        if dist.is_initialized():  # each rank has the rows of its micro-batches, and 0 elsewhere
            dist.all_reduce(torch.from_numpy(policy))
        outcome = Outcome()
        outcome.see(policy, self.held, self.judge)
        means = outcome.means
        score = Score(
            rows=rows.examples,
            loss=outcome.loss / outcome.pairs,
            preference_accuracy=means["preference_accuracy"],
            supervised_tokens=rows.supervised,
        )
        return score, {"sequence_accuracy": None, "classification": None, "preference": means}


def forward_backward(
    model: Any,
    work: Work,
    reference: Floats,
    judge: Judge,
    normaliser: float,
    outcome: Outcome,
    collect: Callable[[], None] = lambda: None,
) -> None:
    """Add the gradients of the pairs in `work` to the parameters, their losses divided by `normaliser`.

    `reference` [rows]: log-probabilities of all rows of the step under the start; the pairs of `work` are seen by
    `outcome`. `collect` is called after each backward pass.
    """
    policy, weights = np.zeros(len(reference)), np.zeros(len(reference))
    trunk = Trunk(work.trunk.tokens) if work.trunk is not None else None
    first: _Pass | None = None
    if work.trunk is not None:
        first = _Pass(model, work.trunk, step.hidden_states(model, work.trunk, becomes=trunk))
        first.add_to(policy)

    def judged(tree: Forest) -> None:
        pairs = np.unique(tree.sequences // 2)
        rows = np.stack([2 * pairs, 2 * pairs + 1], axis=1).reshape(-1)
        outcome.see(policy[rows], reference[rows], judge)
        weights[rows] = judge.weights(judge.margins(policy[rows], reference[rows])) / normaliser

    for tree in work.forests:
        if len(tree.sources):
            now = _Pass(model, tree, step.hidden_states(model, tree, trunk=trunk))
            now.add_to(policy)
            judged(tree)
            now.learn(weights)
            collect()
    if first is not None:
        first.learn(weights)
        collect()


class _Pass:
    """A forest that went forward and is to go backward."""

    def __init__(self, model: Any, tree: Forest, hidden: Tensor) -> None:
        base = step.inner(model)
        self.tree, self.hidden = tree, hidden
        self.head, self.vocabulary = losses.Head(base), step.vocabulary_of(base)
        self.targets = torch.from_numpy(tree.targets).to(hidden.device)
        self.nll, self.sent = losses.score(hidden.detach(), self.head, self.targets, self.vocabulary, gradient=True)

    def add_to(self, policy: Floats) -> None:
        """The log-probability of what each row [rows] has here."""
        np.subtract.at(policy, self.tree.sequences, self.nll.double().cpu().numpy())

    def learn(self, weights: Floats) -> None:
        """Backward, each row's tokens weighing `weights` [rows]."""
        each = torch.from_numpy(weights[self.tree.sequences]).float().to(self.hidden.device)
        if self.sent is None:
            losses.backward(self.hidden, self.head, self.targets, each, 1.0, self.vocabulary)
        elif self.hidden.requires_grad:
            self.hidden.backward((self.sent * each[:, None]).to(self.sent.dtype))
