"""A sweep in the terminal: its trials while they go, as a table that moves or as lines, and what came of it.

Does not know: how trials are carried out (sweeping.py).
"""

from __future__ import annotations

import sys
from fractions import Fraction
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from luthier.cli.output import console, duration, number, short, typed, visible
from luthier.cli.proof import show_proof
from luthier.spec.sweep import Result, Rung, Trial, ranked

if TYPE_CHECKING:
    from typing import Self

    from luthier.cli.sweeping import Folder

REFRESH = 0.5  # seconds
REASON = 160  # characters of why a trial failed
STATES = {"won": "green", "failed": "red", "left": "dim"}


class Lines:
    """A line when a trial sets out or is measured; on standard error, where no terminal is or JSON was asked for."""

    def __init__(self) -> None:
        self.words = ""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None

    def begin(self, result: Result, trial: Trial, share: Fraction | None) -> None:
        del result
        self.words = f"Trial {trial.number} ({trial.words})"
        steps = "all its steps" if share == 1 else f"to {share} of its steps"
        self.say(f"{self.words}: {'to its end' if share is None else steps}")

    def see(self, event: dict[str, Any]) -> None:
        if event["type"] == "rung":
            self.say(f"{self.words}: {measured(Rung(**{name: event[name] for name in Rung.model_fields}))}")
        elif event["type"] == "failed":
            self.say(f"{self.words} failed: {event['message']}")

    def say(self, message: str) -> None:
        console(stderr=True).print(visible(message), markup=False, soft_wrap=True)

    def tick(self) -> None:
        return None


class Moving:
    """The table of all trials, the one at work with the step it is at."""

    def __init__(self) -> None:
        self.result: Result | None = None
        self.trial: Trial | None = None
        self.doing = ""
        self.live = Live(console=console(), refresh_per_second=1 / REFRESH, transient=True, get_renderable=self._drawn)

    def __enter__(self) -> Self:
        self.live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.live.stop()

    def begin(self, result: Result, trial: Trial, share: Fraction | None) -> None:
        self.result, self.trial = result, trial
        self.doing = "starting"

    def see(self, event: dict[str, Any]) -> None:
        if event["type"] == "step":
            self.doing = f"step {event['step']:,} of {event['steps']:,}, loss {number(event['loss'], '.3f')}"
        elif event["type"] == "phase":
            self.doing = str(event["message"])

    def say(self, message: str) -> None:
        self.live.console.print(visible(message), markup=False, soft_wrap=True)

    def tick(self) -> None:
        return None

    def _drawn(self) -> RenderableType:
        if self.result is None or self.trial is None:
            return Text("Making the sweep ready", "dim")
        words = Text(f"Trial {self.trial.number} ({visible(self.trial.words)}): {visible(self.doing)}", "cyan")
        return Group(words, table(self.result, self.trial.number))  # many trials are cut at the foot


def watcher(as_json: bool) -> Lines | Moving:
    out = console()
    return Lines() if as_json or not sys.stdout.isatty() or out.is_dumb_terminal else Moving()


def measured(rung: Rung) -> str:
    loss = f"loss {number(rung.loss, '.4f')}"
    score = f", {(rung.metric or '').replace('_', ' ')} {number(rung.score, '.4f')}" if rung.score is not None else ""
    return f"{loss}{score} after step {rung.step:,} of {rung.steps:,}"


def table(result: Result, at_work: int | None = None) -> Table:
    """Every trial, a column for each rung; when it is over, the best first."""
    found = Table(box=SIMPLE_HEAD, pad_edge=False)
    found.add_column("", justify="right")
    for name in result.trials[0].values:
        found.add_column(name.replace("_", " "), justify="right")
    for share in result.shares:
        found.add_column("at its end" if share == "1" else f"at {share}", justify="right")
    found.add_column("")
    for trial in _order(result):
        cells = [f"{value:g}" if isinstance(value, float) else str(value) for value in trial.values.values()]
        rungs = [_cell(trial.at(Fraction(share))) for share in result.shares]
        state = "at work" if trial.number == at_work else "" if trial.status == "waiting" else trial.status
        found.add_row(str(trial.number), *cells, *rungs, state, style=STATES.get(trial.status))
    return found


def _order(result: Result) -> list[Trial]:
    """The furthest first, of those the best; until it is over as they were numbered."""
    if result.status == "running":
        return list(result.trials)
    order: list[Trial] = []
    for share in reversed(result.shares):
        order += [trial for trial in ranked(result.trials, Fraction(share), result.by) if trial not in order]
    return [*order, *(trial for trial in result.trials if trial not in order)]


def _cell(rung: Rung | None) -> str:
    if rung is None:
        return ""
    lost = f" ({rung.forgetting:+.1%})" if rung.forgetting is not None else ""
    return number(rung.score if rung.score is not None else rung.loss, ".4f") + lost


def show(folder: Folder, result: Result) -> None:
    """What came of it."""
    out = console()
    what = "Loss of the deciding rows" if result.by == "loss" else "The proof's metric on the deciding rows"
    if any(rung.forgetting is not None for trial in result.trials for rung in trial.rungs):
        what += ", and the general ability lost"
    out.print(f"{what}. {result.rule}", markup=False)
    out.print(table(result))
    for trial in result.trials:
        if trial.failed is not None:
            reason = visible(trial.failed)
            reason = reason if len(reason) <= REASON else reason[: REASON - 1] + "…"
            out.print(Text(f"Trial {trial.number} ({trial.words}) failed: {reason}", "red"), soft_wrap=True)
    out.print(visible(f"Rows: {result.kept_apart}"), style="dim", markup=False, soft_wrap=True)
    won = next(trial for trial in result.trials if trial.number == result.winner)
    out.print(Text(f"The winner is trial {won.number}: {won.words}.", "bold"), soft_wrap=True)
    if result.proof is not None:
        show_proof(result.proof)
    elif result.proof_note:
        out.print(visible(result.proof_note), markup=False, soft_wrap=True)
    lines = (
        ("model", short(f"{won.run}/model")),
        ("talk to it", typed("luthier", "chat", short(won.run))),
        ("results", f"{short(folder.results)}, {short(folder.page)}"),
        ("time", duration(result.seconds)),
    )
    for label, value in lines:
        out.print(f"{label + ':':13}{visible(value)}", markup=False, soft_wrap=True)
    out.print("The same weights again:", markup=False)
    out.print(f"  {visible(result.command or '')}", markup=False, soft_wrap=True)
