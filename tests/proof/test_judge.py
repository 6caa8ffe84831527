"""A proof's figures again, from nothing but the rows in the report: by scikit-learn, scipy and plain counting."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats
from sklearn import metrics

from luthier.proof.choose import METRICS
from luthier.proof.judge import judge, score_answers
from luthier.spec.data import Completion, Example
from luthier.spec.proof import Cost, Proof, ProofRow, WayName

LABELS = ("neg", "pos")


def proof_of(
    metric: str, wanted: list[str], answers: dict[WayName, list[str]], chances: dict[WayName, list[float]] | None = None
) -> Proof:
    """`chances`: of the second of two labels."""
    rows = [
        ProofRow(
            row=n + 1,
            prompt=f"q{n}",
            wanted=reference,
            answers={way: said[n] for way, said in answers.items()},
            chances={way: [1 - p[n], p[n]] for way, p in (chances or {}).items()},
        )
        for n, reference in enumerate(wanted)
    ]
    examples: list[Example] = [Completion(row.prompt, row.wanted) for row in rows]
    chosen = METRICS[metric]
    costs = {way: Cost(prompt_tokens=1, answer_tokens=1, seconds=1.0) for way in answers}
    scored = score_answers(chosen, rows, examples)
    found = judge(chosen, "why", rows, scored, held_out=len(rows), chosen="all", seed=3, costs=costs)
    return Proof.model_validate_json(found.model_dump_json())  # as the report on disk says it


def reviews(n: int = 60) -> Proof:
    random = np.random.default_rng(0)
    truth = random.integers(0, 2, n)
    right: dict[WayName, float] = {"base": 0.55, "examples": 0.6, "tuned": 0.9}
    answers: dict[WayName, list[str]] = {}
    chances: dict[WayName, list[float]] = {}
    for way, share in right.items():
        guesses = np.where(random.random(n) < share, truth, 1 - truth)
        answers[way] = [LABELS[guess] if random.random() > 0.05 else "hm" for guess in guesses]
        chances[way] = [float(p) for p in np.clip(random.normal(guesses, 0.3), 0.01, 0.99)]
    return proof_of("classification", [LABELS[t] for t in truth], answers, chances)


def test_every_figure_of_a_classification_follows_from_its_rows() -> None:
    proof = reviews()
    assert proof.classes == list(LABELS)
    truth = [row.wanted for row in proof.rows]
    for way in proof.ways:
        said = [row.answers[way.name] if row.answers[way.name] in LABELS else "none" for row in proof.rows]
        hits = [row.wanted == row.answers[way.name] for row in proof.rows]
        assert way.score == pytest.approx(metrics.accuracy_score(truth, said))
        assert way.passed == sum(hits)
        assert [row.scores[way.name] for row in proof.rows] == [float(hit) for hit in hits]
        wilson = stats.binomtest(sum(hits), len(hits)).proportion_ci(method="wilson")
        assert way.interval is not None
        assert (way.interval.low, way.interval.high) == pytest.approx((wilson.low, wilson.high))
        f1 = metrics.f1_score(truth, said, labels=list(LABELS), average="macro", zero_division=0.0)
        assert way.details["macro_f1"] == pytest.approx(f1)
        table = metrics.confusion_matrix(truth, said, labels=[*LABELS, "none"])[:2]
        assert proof.confusion[way.name] == table.tolist()
        positive = [row.chances[way.name][1] for row in proof.rows]
        real = [label == "pos" for label in truth]
        assert way.details["auroc"] == pytest.approx(metrics.roc_auc_score(real, positive))
        assert way.details["auprc"] == pytest.approx(metrics.average_precision_score(real, positive))
        assert sum(each.rows for each in proof.calibration[way.name]) == len(proof.rows)
    for comparison in proof.comparisons:
        pairs = [(row.scores["tuned"], row.scores[comparison.against]) for row in proof.rows]
        gained = [row.row for row, pair in zip(proof.rows, pairs, strict=True) if pair == (1, 0)]
        lost = [row.row for row, pair in zip(proof.rows, pairs, strict=True) if pair == (0, 1)]
        assert (comparison.gained, comparison.lost) == (gained, lost)
        assert comparison.difference == pytest.approx((len(gained) - len(lost)) / len(pairs))
        sign = stats.binomtest(len(gained), len(gained) + len(lost))
        assert comparison.p_value == pytest.approx(sign.pvalue)
        assert comparison.verdict == "helped"
    assert proof.verdict == "helped"
    assert proof.sentence.startswith("Tuning helped (accuracy, 60 rows).")


def test_every_figure_of_scores_follows_from_its_rows() -> None:
    wanted = [f'{{"a": {n}, "b": {n % 3}, "c": null}}' for n in range(24)]
    base = [f'{{"a": {n}, "b": {n % 2}}}' for n in range(24)]
    tuned = [text if n % 4 else "sorry" for n, text in enumerate(wanted)]
    proof = proof_of("json", wanted, {"base": base, "tuned": tuned})
    scores = {name: np.array([row.scores[name] for row in proof.rows]) for name in ("base", "tuned")}
    by_hand = [2 * (1 + (n % 2 == n % 3)) / 5 for n in range(24)]
    assert scores["base"].tolist() == pytest.approx(by_hand)
    assert scores["tuned"].tolist() == [float(n % 4 > 0) for n in range(24)]
    for way in proof.ways:
        assert way.interval is not None
        assert way.score == pytest.approx(scores[way.name].mean())
        assert way.passed == (scores[way.name] == 1).sum()
    base_way, comparison = proof.ways[0], proof.comparisons[0]
    theirs = stats.bootstrap(
        (scores["base"],), np.mean, n_resamples=20_000, method="BCa", rng=np.random.default_rng(1)
    ).confidence_interval
    assert base_way.interval is not None
    assert (base_way.interval.low, base_way.interval.high) == pytest.approx((theirs.low, theirs.high), abs=0.01)
    differences = scores["tuned"] - scores["base"]
    assert comparison.difference == pytest.approx(differences.mean())
    flipped = stats.permutation_test(
        (differences,),
        lambda x, axis: np.mean(x, axis=axis),
        permutation_type="samples",
        n_resamples=20_000,
        rng=np.random.default_rng(1),
    )
    assert comparison.p_value == pytest.approx(flipped.pvalue, abs=0.02)


def answered(way_right: dict[WayName, int], n: int = 40) -> Proof:
    answers = {way: ["yes" if place < right else "no" for place in range(n)] for way, right in way_right.items()}
    return proof_of("exact_match", ["yes"] * n, answers)


@pytest.mark.parametrize(
    ("right", "verdict", "words"),
    [
        ({"base": 5, "examples": 20, "tuned": 35}, "helped", "Tuning helped ("),
        (
            {"base": 5, "examples": 33, "tuned": 35},
            "not shown to help",
            "Not shown to help more than the base with examples",
        ),
        ({"base": 5, "examples": 35, "tuned": 20}, "worse", "Tuning helped, and is worse than a rival"),
        ({"base": 35, "tuned": 10}, "worse", "Tuning made it worse ("),
        ({"base": 0, "tuned": 3}, "not shown to help", "Not shown to help ("),
        ({"tuned": 3}, None, "40 rows; there is nothing to compare with."),
    ],
)
def test_the_verdict_is_about_the_best_rival(right: dict[WayName, int], verdict: str | None, words: str) -> None:
    proof = answered(right)
    assert proof.verdict == verdict
    assert proof.sentence.startswith(words)


def test_few_rows_show_nothing() -> None:
    """Five of five against none of five: the exact test cannot go below 1/16."""
    proof = answered({"base": 0, "tuned": 5}, n=5)
    assert proof.comparisons[0].p_value == 2 / 2**5
    assert proof.verdict == "not shown to help"


def test_of_losses_the_lower_is_better() -> None:
    from luthier.proof.metrics import Scored

    rows = [ProofRow(row=n, prompt="", wanted="", weight=float(10 + n)) for n in range(30)]
    scored: dict[WayName, Scored] = {
        "base": Scored([3.0 + n / 100 for n in range(30)]),
        "tuned": Scored([2.0 + n / 50 for n in range(30)]),
    }
    proof = judge(METRICS["perplexity"], "", rows, scored, held_out=30, chosen="")
    weights = np.array([row.weight for row in rows])
    assert proof.ways[1].score == pytest.approx(np.average([2.0 + n / 50 for n in range(30)], weights=weights))
    assert proof.verdict == "helped"
    assert proof.comparisons[0].gained == []
