"""Classification: answers as labels, scikit-learn's report, and what label probabilities tell.

An answer is read kindly, for every way alike: case and punctuation around it do not matter, and a longer answer counts
when it names exactly one label in its first line. So a base that says "The review is positive." is not called wrong for
its manners; `exact_match` tells how often an answer is the bare label.
"""

from __future__ import annotations

import re
import string
import unicodedata
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from luthier.proof.metrics import Details, Scored, is_exact, mean
from luthier.spec.data import Example
from luthier.spec.proof import Bin

BINS = 10
_AROUND = string.punctuation + string.whitespace + "。，！？、：；“”‘’「」《》（）"


def labels_of(wanted: Sequence[str]) -> list[str]:
    """The labels, sorted: the distinct references."""
    return sorted({reference.strip() for reference in wanted})


def plain(text: str) -> str:
    return unicodedata.normalize("NFKC", text).casefold().strip(_AROUND)


def label_of(answer: str, labels: Sequence[str]) -> int | None:
    """The number of the label that `answer` gives; None when it gives none, or more than one."""
    if answer.strip() in labels:
        return labels.index(answer.strip())
    said = plain(answer)
    same = [number for number, label in enumerate(labels) if plain(label) == said]
    if same or not said:
        return same[0] if len(same) == 1 else None
    line = plain(said.splitlines()[0])
    named = [number for number, label in enumerate(labels) if _names(line, plain(label))]
    longer = [n for n in named if not any(m != n and plain(labels[n]) in plain(labels[m]) for m in named)]
    return longer[0] if len(longer) == 1 else None


def _names(line: str, label: str) -> bool:
    """As a word of its own; scripts that part no words name it anywhere."""
    if not label:
        return False
    edge = r"\b" if label.isascii() else ""
    return re.search(f"{edge}{re.escape(label)}{edge}", line) is not None


def classification(answers: Sequence[str], wanted: Sequence[str], examples: Sequence[Example]) -> Scored:
    """1 where the answer gives the right label. Details: scikit-learn's precision, recall and F1, macro averages over
    the labels that are wanted, and the share of answers that give a label."""
    del examples
    from sklearn.metrics import precision_recall_fscore_support  # type: ignore[import-untyped]

    labels = labels_of(wanted)
    truth = [labels.index(reference.strip()) for reference in wanted]
    said = [label_of(answer, labels) for answer in answers]
    rows = [float(guess == right) for guess, right in zip(said, truth, strict=True)]
    guesses = [len(labels) if guess is None else guess for guess in said]
    each = precision_recall_fscore_support(truth, guesses, labels=range(len(labels)), zero_division=0.0)
    precision, recall, f1, support = (np.asarray(part, dtype=float) for part in each)
    details: Details = {
        "macro_precision": float(precision.mean()),
        "macro_recall": float(recall.mean()),
        "macro_f1": float(f1.mean()),
        "weighted_f1": float((f1 * support).sum() / support.sum()),
        "answers_with_a_label": mean([float(guess is not None) for guess in said]),
        "exact_match": mean([float(is_exact(*pair)) for pair in zip(answers, wanted, strict=True)]),
    }
    for number, label in enumerate(labels):
        details |= {f"precision of {label}": float(precision[number]), f"recall of {label}": float(recall[number])}
        details[f"f1 of {label}"] = float(f1[number])
    return Scored(rows, details)


def confusion(answers: Sequence[str], wanted: Sequence[str], labels: Sequence[str]) -> list[list[int]]:
    """[wanted][answered] counts; one column more than labels, for answers that give none."""
    table = [[0] * (len(labels) + 1) for _ in labels]
    for answer, reference in zip(answers, wanted, strict=True):
        guess = label_of(answer, labels)
        table[labels.index(reference.strip())][len(labels) if guess is None else guess] += 1
    return table


# -- probabilities of the labels ---------------------------------------------------------------------------------------


def ranking(chances: npt.NDArray[np.float64], truth: Sequence[int]) -> Details:
    """AUROC and AUPRC of label probabilities [N, C]: of two labels for the second one, of more the mean over each
    label against the rest. Null where a label is always or never right."""
    from sklearn.metrics import average_precision_score, roc_auc_score

    places = [1] if chances.shape[1] == 2 else range(chances.shape[1])
    under: list[float] = []
    precise: list[float] = []
    for place in places:
        real = np.asarray(truth) == place
        if not 0 < real.sum() < len(real):
            return {"auroc": None, "auprc": None}
        under.append(float(roc_auc_score(real, chances[:, place])))
        precise.append(float(average_precision_score(real, chances[:, place])))
    return {"auroc": mean(under), "auprc": mean(precise)}


def calibration(chances: npt.NDArray[np.float64], truth: Sequence[int]) -> tuple[list[Bin], float]:
    """(bins of equal width by the probability of the likeliest label, expected calibration error).

    The error is the mean distance of confidence and accuracy, weighted by rows (Naeini et al., 2015). Empty bins are
    left out.
    """
    confidence, guess = chances.max(axis=1), chances.argmax(axis=1)
    hit = guess == np.asarray(truth)
    place = np.minimum((confidence * BINS).astype(int), BINS - 1)
    bins = [
        Bin(rows=int(here.sum()), confidence=float(confidence[here].mean()), right=int(hit[here].sum()))
        for number in range(BINS)
        if (here := place == number).any()
    ]
    error = sum(abs(each.confidence * each.rows - each.right) for each in bins) / len(hit)
    return bins, float(error)
