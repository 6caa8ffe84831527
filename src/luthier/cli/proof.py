"""A proof in the terminal: the ways side by side, what is shown and what is not, and which rows turned.

Does not know: how anything is measured; the HTML page (proof/page.py).
"""

from __future__ import annotations

from luthier.cli.output import console, visible
from luthier.spec.proof import Comparison, Proof, Way

TITLES = {"base": "base", "examples": "base + examples", "tuned": "tuned"}
COLOURS = {"helped": "green", "worse": "red", "not shown to help": "yellow"}
ROWS_NAMED = 12


def show_proof(proof: Proof) -> None:
    """The table of the ways, then the verdict."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    out = console()
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("")
    for way in proof.ways:
        table.add_column(TITLES[way.name], justify="right", overflow="fold")
    for label, cells in proof_lines(proof):
        table.add_row(visible(label), *map(visible, cells))
    out.print(table)
    out.print(Text(visible(proof.sentence), COLOURS.get(proof.verdict or "", "")), soft_wrap=not out.is_terminal)
    for comparison in proof.comparisons:
        for line in flips(comparison):
            out.print(line, markup=False, highlight=False, soft_wrap=not out.is_terminal)
    for words in (f"Metric: {proof.metric}. {proof.why}", proof.chosen, *proof.notes):
        out.print(visible(words), style="dim", markup=False, highlight=False, soft_wrap=not out.is_terminal)


def proof_lines(proof: Proof) -> list[tuple[str, list[str]]]:
    """(label, a cell for each way) of the table."""
    lines = [
        (proof.metric.replace("_", " "), [score_words(proof, way.score) for way in proof.ways]),
        ("95% interval", [_interval(proof, way) for way in proof.ways]),
    ]
    if proof.pass_mark is not None:
        passed = "passed" if proof.pass_mark == 1 else f"passed ({proof.pass_mark:g} or more)"
        passed = "pairs right" if proof.metric == "preference" else passed
        lines.append((passed, [f"{way.passed} of {len(proof.rows)}" for way in proof.ways]))
    every = dict.fromkeys(name for way in proof.ways for name in way.details)
    names = [name for name in every if " of " not in name and name != proof.metric]  # those of single labels are many
    lines += [(name.replace("_", " "), [_number(way.details.get(name)) for way in proof.ways]) for name in names]
    costs = [way.cost for way in proof.ways if way.cost is not None]
    if len(costs) == len(proof.ways):
        rows = max(1, len(proof.rows))
        lines.append(("prompt tokens a row", [f"{cost.prompt_tokens / rows:,.1f}" for cost in costs]))
        lines.append(("answer tokens a second", [_number(cost.tokens_per_second, ",.1f") for cost in costs]))
        lines.append(("seconds an answer, alone", [_number(cost.latency) for cost in costs]))
    return lines


def score_words(proof: Proof, value: float | None) -> str:
    """Shares as percentages; nats as they are."""
    if value is None:
        return "-"
    return f"{value:.1%}" if proof.in_shares else f"{value:.4f}"


def _interval(proof: Proof, way: Way) -> str:
    if way.interval is None:
        return "-"
    return f"{score_words(proof, way.interval.low)} to {score_words(proof, way.interval.high)}"


def _number(value: float | None, form: str = ".3f") -> str:
    return "-" if value is None else format(value, form)


def flips(comparison: Comparison) -> list[str]:
    """Which rows turned, in words."""
    if not comparison.gained and not comparison.lost:
        return []
    other = TITLES[comparison.against]
    return [
        f"Beside {other}: {len(rows)} rows {words}{_named(rows)}"
        for words, rows in (("turned right", comparison.gained), ("turned wrong", comparison.lost))
        if rows
    ]


def _named(rows: list[int]) -> str:
    more = f" and {len(rows) - ROWS_NAMED} more" if len(rows) > ROWS_NAMED else ""
    return f" ({', '.join(map(str, rows[:ROWS_NAMED]))}{more})"
