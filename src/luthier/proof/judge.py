"""From the rows and what each way answered to the proof: scores, intervals, tests, flips, and a sentence.

A tuned model has to beat two rivals: the base as it came, and the base with examples in its prompt. `helped` is said
only when it is shown against every rival that was measured; since all must be shown, no correction for their number is
due. Does not know: models; pages.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from luthier.proof import classes, significance
from luthier.proof.metrics import Metric, Scored
from luthier.spec.data import Example
from luthier.spec.proof import WAYS, Comparison, Cost, Proof, ProofRow, Verdict, Way, WayName

NAMES: dict[WayName, str] = {"base": "the base", "examples": "the base with examples in its prompt", "tuned": "tuned"}


def score_answers(metric: Metric, rows: Sequence[ProofRow], examples: Sequence[Example]) -> dict[WayName, Scored]:
    """Each way that answered every row, scored; `examples` are the rows' own, in the same order."""
    wanted = [row.wanted for row in rows]
    return {
        way: metric.score([row.answers[way] for row in rows], wanted, examples)
        for way in WAYS
        if rows and all(way in row.answers for row in rows)
    }


def judge(
    metric: Metric,
    why: str,
    rows: Sequence[ProofRow],
    scored: Mapping[WayName, Scored],
    *,
    held_out: int,
    chosen: str,
    seed: int = 0,
    examples: int = 0,
    costs: Mapping[WayName, Cost] | None = None,
) -> Proof:
    """The proof over `rows`, whose `scores` it fills in."""
    proof = Proof(
        metric=metric.name,  # type: ignore[arg-type]
        why=why,
        higher_is_better=metric.higher_is_better,
        pass_mark=metric.pass_mark,
        held_out=held_out,
        chosen=chosen,
        seed=seed,
        examples=examples,
        rows=list(rows),
    )
    weights = [row.weight for row in rows]
    for way, found in scored.items():
        for row, score in zip(rows, found.rows, strict=True):
            row.scores[way] = score
        proof.ways.append(_way(way, found, weights, metric, seed, (costs or {}).get(way)))
    if metric.name == "classification":
        _classify(proof, scored)
    if "tuned" in scored:
        proof.comparisons = [_compare(proof, way, weights, seed) for way in scored if way != "tuned"]
    proof.verdict, proof.sentence = _outcome(proof, metric)
    return proof


def _way(name: WayName, found: Scored, weights: Sequence[float], metric: Metric, seed: int, cost: Cost | None) -> Way:
    total = sum(score * weight for score, weight in zip(found.rows, weights, strict=True)) / sum(weights)
    passed = None
    if metric.pass_mark is not None:
        passed = sum(score >= metric.pass_mark for score in found.rows)
    interval = significance.interval_of(found.rows, weights, seed)
    return Way(name=name, score=total, interval=interval, passed=passed, details=dict(found.details), cost=cost)


def _compare(proof: Proof, against: WayName, weights: Sequence[float], seed: int) -> Comparison:
    tuned = [row.scores["tuned"] for row in proof.rows]
    other = [row.scores[against] for row in proof.rows]
    total = sum(weights)
    pairs = zip(tuned, other, weights, strict=True)
    difference = sum((one - two) * weight for one, two, weight in pairs) / total
    interval = significance.interval_of_difference(tuned, other, weights, seed)
    p_value, test = significance.test_of_difference(tuned, other, weights, seed)
    comparison = Comparison(
        against=against,
        difference=difference,
        interval=interval,
        p_value=p_value,
        test=test,
        verdict=significance.verdict(difference, interval, p_value, proof.higher_is_better),
    )
    if (mark := proof.pass_mark) is not None:
        for row in proof.rows:
            before, after = row.scores[against] >= mark, row.scores["tuned"] >= mark
            if before != after:
                (comparison.gained if after else comparison.lost).append(row.row)
    return comparison


def _classify(proof: Proof, scored: Mapping[WayName, Scored]) -> None:
    wanted = [row.wanted for row in proof.rows]
    proof.classes = classes.labels_of(wanted)
    truth = [proof.classes.index(reference.strip()) for reference in wanted]
    for name in scored:
        answers = [row.answers[name] for row in proof.rows]
        proof.confusion[name] = classes.confusion(answers, wanted, proof.classes)
        if all(name in row.chances for row in proof.rows):
            chances = np.array([row.chances[name] for row in proof.rows])
            way = proof.way(name)
            assert way is not None
            proof.calibration[name], error = classes.calibration(chances, truth)
            way.details |= {**classes.ranking(chances, truth), "calibration_error": error}


# -- in words ----------------------------------------------------------------------------------------------------------


def _outcome(proof: Proof, metric: Metric) -> tuple[Verdict | None, str]:
    if not proof.comparisons:
        return None, f"{len(proof.rows)} rows; there is nothing to compare with."
    verdicts = {comparison.verdict for comparison in proof.comparisons}
    overall: Verdict = "not shown to help"
    if "worse" in verdicts:
        overall = "worse"
    elif verdicts == {"helped"}:
        overall = "helped"
    parts = [f"{NAMES[each.against]}: {_said(each)}" for each in proof.comparisons]
    opening = {
        "helped": "Tuning helped",
        "worse": "Tuning made it worse",
        "not shown to help": "Not shown to help",
    }[overall]
    if overall == "not shown to help" and "helped" in verdicts:
        rivals = [NAMES[each.against] for each in proof.comparisons if each.verdict != "helped"]
        opening = f"Not shown to help more than {rivals[0]}"
    if overall == "worse" and "helped" in verdicts:
        opening = "Tuning helped, and is worse than a rival"
    return overall, f"{opening} ({metric.words}, {len(proof.rows)} rows). Tuned beside {'; beside '.join(parts)}."


def _said(comparison: Comparison) -> str:
    low, high = comparison.interval.low, comparison.interval.high
    return f"{comparison.difference:+.3f} (95%: {low:+.3f} to {high:+.3f}; p {p_words(comparison.p_value)})"


def p_words(value: float) -> str:
    """As it follows the letter p."""
    return "< 0.0001" if value < 0.0001 else f"= {value:.4f}" if value < 0.1 else f"= {value:.2f}"
