"""`luthier estimate`: what `luthier train` with the same options would take, without training.

The engine makes everything ready in a folder of its own, measures a few micro-batches and leaves; nothing stays.
Does not know: torch, how it is measured.
"""

from __future__ import annotations

import inspect
import sys
import tempfile
from typing import Annotated, Any

import typer

from luthier.cli.output import console, duration, plural, print_error, print_json, resolve_model, size
from luthier.spec.data import Problem
from luthier.spec.forecast import Forecast
from luthier.spec.run import RunFolder


def estimate(**options: Any) -> None:
    """Say what a training run would take: tokens, steps, time, memory, disk, and money at a rate.

    Takes the options of `luthier train`. A few micro-batches of your own data are computed on this machine; what was
    measured is remembered, so asking again is quicker. Exit codes: as `luthier train`; a run that this machine cannot
    hold ends with 2 and the setting that would fit.
    """
    from luthier.cli.train import read_request

    per_hour, as_json = options.pop("per_hour"), options.pop("as_json")
    request, values = read_request({name: value for name, value in options.items() if value not in (None, [])})
    resolve_model(request.model)
    with tempfile.TemporaryDirectory(prefix="luthier-estimate-") as folder:
        run = RunFolder(folder).create(values)
        raise typer.Exit(_ask(run, values, per_hour, as_json))


def _own_options() -> list[inspect.Parameter]:
    panel = "This command"
    per_hour = typer.Option(
        "--per-hour", metavar="X", min=0.0, help="Price of an hour of this machine, in any currency.",
        rich_help_panel=panel,
    )  # fmt: skip
    as_json = typer.Option("--json", help="Print the forecast as one JSON object.", rich_help_panel=panel)
    kind = inspect.Parameter.KEYWORD_ONLY
    return [
        inspect.Parameter("per_hour", kind, default=None, annotation=Annotated[float | None, per_hour]),
        inspect.Parameter("as_json", kind, default=False, annotation=Annotated[bool, as_json]),
    ]


def _sign() -> None:
    from luthier.cli.train import request_options

    signature = inspect.Signature([*request_options(), *_own_options()])
    estimate.__signature__ = signature  # type: ignore[attr-defined]


_sign()


class _View:
    """Phases on standard error where a person looks; warnings always."""

    def __init__(self, quiet: bool) -> None:
        self.quiet = quiet
        self.forecast: dict[str, Any] | None = None
        self.warnings: list[str] = []

    def see(self, event: dict[str, Any]) -> None:
        if event["type"] == "forecast":
            self.forecast = event
        elif event["type"] == "warning":
            self.warnings.append(f"{event['message']} {event.get('hint') or ''}".strip())
        elif event["type"] == "phase" and not self.quiet:
            console(stderr=True).print(f"{event['message']} ...", style="dim", markup=False, highlight=False)

    def say(self, message: str) -> None:
        print(message, file=sys.stderr)

    def tick(self) -> None:
        pass


def _ask(run: RunFolder, request: dict[str, Any], per_hour: float | None, as_json: bool) -> int:
    from luthier.cli.follow import engine_command, follow

    view = _View(as_json)
    outcome = follow(run, engine_command(run, estimate=True), view)
    event, found = outcome.event, None
    if view.forecast is not None:
        found = Forecast(**{name: view.forecast[name] for name in Forecast.model_fields})
    if as_json:
        cost = {"cost": round(found.cost(per_hour), 4)} if found and per_hour is not None else {}
        said = {name: event.get(name) for name in ("code", "message", "hint", "param") if event["type"] == "failed"}
        whole = {**found.model_dump(), "seconds": round(found.seconds, 2), **cost} if found else None
        print_json({"forecast": whole, "warnings": view.warnings, "status": outcome.status, **said})
        return outcome.exit_code
    if found is not None:
        _print(found, per_hour, "pair" if request.get("objective") == "dpo" else "row")
    for words in view.warnings:
        console().print(f"Warning: {words}", markup=False, highlight=False, soft_wrap=True)
    if outcome.status == "failed":
        problems = [Problem(**problem) for problem in event.get("problems") or []]
        print_error(str(event.get("message")), str(event.get("hint") or ""), problems)
    return outcome.exit_code


def _print(found: Forecast, per_hour: float | None, noun: str) -> None:
    rows = plural(found.rows, noun)
    if found.dropped or found.truncated:
        rows += f"; {found.dropped:,} dropped and {found.truncated:,} cut, {found.lost_tokens:,} tokens lost"
    tokens = f"{found.tokens:,} in a pass, {found.supervised_tokens:,} of them learnt"
    if found.tree_ratio and found.tree_ratio > 1.05:
        tokens += f"; shared prefixes save a factor of {found.tree_ratio:.2f}"
    parts = ", ".join(f"{name} {duration(taken)}" for name, taken in found.parts)
    memory = size(found.peak_memory_bytes)
    memory += f" of {size(found.memory_bytes)}" if found.memory_bytes else ""
    lines = [
        (f"{noun}s", rows),
        ("tokens", tokens),
        ("steps", f"{found.steps:,} in {plural(found.epochs, 'epoch')}, {found.micro_batches:,} micro-batches"),
        ("time", f"{duration(found.seconds)} ({parts})"),
        ("memory", memory),
        ("disk", f"{size(found.disk_bytes)} of {size(found.free_disk_bytes)} free"),
    ]
    if per_hour is not None:
        lines.append(("cost", f"{found.cost(per_hour):,.2f} at {per_hour:g} an hour"))
    lines.append(("known from", "measuring just now" if found.measured else "earlier runs on this machine"))
    for label, value in lines:
        console().print(f"{label + ':':12}{value}", markup=False, highlight=False, soft_wrap=True)
