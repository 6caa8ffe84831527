"""Classification metrics of prompt/completion data: each validation row's class is predicted, not generated.

The classes are the distinct completions of training and validation rows. A row's prediction compares the probability
of each class's first token right after its prompt, which the validation's own forward pass has already computed. Where
two classes begin with the same token, whole completions are compared instead, at the cost of a second pass.
Columns and threshold are those of OpenAI's fine-tunes results. Does not know: the loop, files.
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

from luthier.data.dataset import Rows
from luthier.data.render import Renderer
from luthier.engine import loss, step, stream
from luthier.engine.forest import Forest, Row
from luthier.spec.data import Completion
from luthier.spec.errors import BadData
from luthier.spec.job import TrainRequest

Columns = dict[str, float | None]
NAMED = 10  # classes listed in a message
THRESHOLD = 0.5


@dataclass(frozen=True)
class Classes:
    """The classes of a run and the truth about its validation rows.

    `tokens[c]`: ids of class c, its end included; `truth[i]`: class of validation row i; `first`: the classes' first
    tokens, or None when two share theirs; `positive`: of two classes the one that is looked for.
    """

    names: list[str]
    tokens: list[tuple[int, ...]]
    truth: npt.NDArray[np.int64]
    first: list[int] | None
    positive: int | None
    betas: list[float]

    def look(self, model: Any) -> Look:
        """What to watch one validation pass with."""
        return Look(self, model)


class Look:
    """One validation: a step.Watch during the pass, then `columns`."""

    def __init__(self, classes: Classes, model: Any) -> None:
        self.classes, self.model = classes, model
        self.head = loss.Head(step.inner(model))
        self.vocabulary = int(step.inner(model).config.get_text_config().vocab_size)
        self.scores = np.zeros((len(classes.truth), len(classes.names)))

    def __call__(self, tree: Forest, hidden: Tensor) -> None:
        """Score the forest's rows by the first token of each class. hidden [N, H]."""
        if self.classes.first is None:
            return
        rows, at = np.unique(tree.sequences, return_index=True)  # the first target of a row begins its answer
        states = hidden.index_select(0, torch.from_numpy(at).to(hidden.device))
        for part in loss.slices(states, self.vocabulary):
            self.scores[rows[part]] = self.head(states[part])[:, self.classes.first].double().cpu().numpy()

    def columns(self, rows: Rows, micro_tokens: int, longest: int, part: slice) -> Columns:
        """The metrics, after every rank has seen its share of `rows`."""
        if self.classes.first is None:
            self._score_whole(rows, micro_tokens, longest, part)
        if dist.is_initialized():
            total = torch.from_numpy(self.scores)
            dist.all_reduce(total)
        return columns(self.classes.truth, self.scores, self.classes.positive, self.classes.betas)

    def _score_whole(self, rows: Rows, micro_tokens: int, longest: int, part: slice) -> None:
        """Log-probability of every class's whole completion after every prompt."""
        room = longest - max(map(len, self.classes.tokens))
        pairs: list[Row] = []
        for ids, weights in rows:
            prompt = ids[: _answer_start(weights)][-room:]
            for tokens in self.classes.tokens:
                marks = np.r_[np.zeros(len(prompt)), np.ones(len(tokens))].astype(np.float32)
                pairs.append((np.r_[prompt, tokens].astype(np.int32), marks))
        self.scores[:] = stream.row_log_probs(self.model, pairs, micro_tokens, part=part).reshape(self.scores.shape)


def prepare(
    request: TrainRequest, renderer: Renderer, train: Rows, validation: Rows | None, warn: Callable[[str], None]
) -> Classes | None:
    """The classes of a run that asks for them, else None. Raises BadData when the rows are no such classification."""
    if not request.classifies or validation is None:
        return None
    if not (train.pairs and validation.pairs):
        raise BadData(
            "Classification is measured on prompt/completion rows, and some of these are chats or texts.",
            param="data",
            hint="Leave the classification options out, or give rows with `prompt` and `completion`.",
        )
    found = sorted({_answer(row) for rows in (train, validation) for row in rows})
    names = [_spelt(renderer, tokens) for tokens in found]
    wanted = request.classification_n_classes or 2
    if len(found) != wanted:
        raise BadData(
            f"The completions are {len(found)} classes, wanted {wanted}: {_listed(names)}.",
            param="classification_n_classes" if request.classification_n_classes else "classification_positive_class",
            hint="Classes are told apart to the letter; check the completions for spaces and spelling.",
        )
    index = {tokens: number for number, tokens in enumerate(found)}
    positive = None
    if request.classification_positive_class is not None:
        asked = Completion("a", request.classification_positive_class)
        [row] = renderer.rows(asked)
        positive = index.get(_answer((np.asarray(row.ids, np.int32), np.asarray(row.weights, np.float32))))
        if positive is None:
            raise BadData(
                f"The positive class {request.classification_positive_class!r} is not among the completions: "
                f"{_listed(names)}.",
                param="classification_positive_class",
                hint="Write it as the completions do, a leading space included.",
            )
    truth = np.array([index[_answer(row)] for row in validation], dtype=np.int64)
    betas = request.classification_betas or [1.0]
    return Classes(names, found, truth, _first_tokens(found, names, warn), positive, betas)


def columns(
    truth: npt.NDArray[np.int64], scores: npt.NDArray[np.float64], positive: int | None, betas: Sequence[float]
) -> Columns:
    """Metrics of rows with scores [N, C] (log-probabilities, up to a constant a row). Undefined ones are None."""
    from sklearn import metrics  # type: ignore[import-untyped]

    if positive is None:
        guess = scores.argmax(axis=1)
        return {
            "classification/accuracy": _number(metrics.accuracy_score(truth, guess)),
            "classification/weighted_f1_score": _number(
                metrics.f1_score(truth, guess, average="weighted", zero_division=0.0)
            ),
        }
    chances = np.exp(scores - scores.max(axis=1, keepdims=True))
    chance = chances[:, positive] / chances.sum(axis=1)
    real, said = truth == positive, chance >= THRESHOLD
    undefined = {"zero_division": np.nan}
    found: Columns = {
        "classification/accuracy": _number(metrics.accuracy_score(real, said)),
        "classification/precision": _number(metrics.precision_score(real, said, **undefined)),
        "classification/recall": _number(metrics.recall_score(real, said, **undefined)),
        "classification/auroc": _number(metrics.roc_auc_score(real, chance)) if 0 < real.sum() < len(real) else None,
        "classification/auprc": _number(metrics.average_precision_score(real, chance)) if real.any() else None,
    }
    for beta in betas:
        score = metrics.fbeta_score(real, said, beta=beta, **undefined)
        found[f"classification/f{float(beta)}"] = _number(score)
    return found


def _number(value: Any) -> float | None:
    return None if np.isnan(value) else float(value)


def _first_tokens(found: list[tuple[int, ...]], names: list[str], warn: Callable[[str], None]) -> list[int] | None:
    known: dict[int, str] = {}
    for tokens, name in zip(found, names, strict=True):
        if tokens[0] in known:
            warn(
                f"The classes {known[tokens[0]]!r} and {name!r} begin with the same token, so whole completions are "
                "compared; a class of one token is measured faster."
            )
            return None
        known[tokens[0]] = name
    return list(known)


def _answer_start(weights: npt.NDArray[np.float32]) -> int:
    return int(np.argmax(weights >= 1))


def _answer(row: Row) -> tuple[int, ...]:
    ids, weights = row
    return tuple(map(int, ids[weights >= 1]))


def _spelt(renderer: Renderer, tokens: Sequence[int]) -> str:
    return renderer.tokenizer.decode(token for token in tokens if token not in renderer.stop_ids)


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(map(repr, names[:NAMED])) + more
