"""How a run is shown while it goes: a live view on a terminal, plain lines elsewhere, JSON lines on request.

All three see the same events (spec/run.py) and keep the same account of them. Does not know: processes, files.
"""

from __future__ import annotations

import time
from collections import deque
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from luthier.cli.chart import Point, loss_chart
from luthier.cli.output import duration, number, plural, print_json, short, size, visible
from luthier.spec.forecast import Forecast
from luthier.spec.forgetting import Forgetting
from luthier.spec.learning import Learning

if TYPE_CHECKING:
    from typing import Self

SMOOTHING = 0.8
MOST_POINTS = 4_000  # of the curve; every other one is let go beyond that
REFRESH = 0.25  # seconds
WORTH_SAYING = 1.05  # tree ratio: less is no news
# Phases beside the steps.
WORDS = {
    "validate": "validating", "save": "saving", "keep": "weighing", "prove": "proving", "curve": "proving",
    "forgetting": "probing",
}  # fmt: skip
RATE_STEPS = 10  # tokens/s are those of the last steps


class Account:
    """What is known of a run from its events so far."""

    def __init__(self, request: dict[str, Any]) -> None:
        self.request = request
        self.phases: list[str] = []
        self.phase = ""
        self.bar: tuple[int, int] | None = None
        self.prepared: dict[str, Any] = {}
        self.step: dict[str, Any] = {}
        self.step_seen = 0.0
        self.curve: list[Point] = []
        self.validations: list[tuple[float, dict[str, Any]]] = []
        self.checkpoint: dict[str, Any] = {}
        self.ended = ""
        self._every = 1
        self._mean, self._weight = 0.0, 0.0
        self._recent: deque[dict[str, Any]] = deque(maxlen=RATE_STEPS)

    def see(self, event: dict[str, Any]) -> None:
        kind = event["type"]
        if kind == "started":
            self._begin(event.get("resumed_from") or 0)
        elif kind == "phase":
            self.phase, self.bar = str(event["name"]), None
            self.phases.append(str(event["message"]))
        elif kind == "progress":
            self.bar = (int(event["done"]), int(event["total"]))
        elif kind == "prepared":
            self.prepared = event
        elif kind == "forecast":
            self.phases[-1:] = [forecast_words(event)]
        elif kind == "step":
            self._step(event)
        elif kind == "validation":
            self.validations.append((float(event["step"]), event))
            self.phase, self.bar = "train", None
        elif kind == "checkpoint":
            self.checkpoint = event
        elif kind in ("finished", "stopped", "failed"):
            self.ended = str(event["status"])

    def _begin(self, step: int) -> None:
        """An attempt goes on after `step`; what an earlier one did later than that will be done again."""
        self.phases, self.phase, self.bar, self.step, self.ended = [], "", None, {}, ""
        self.curve = [point for point in self.curve if point[0] <= step]
        self.validations = [found for found in self.validations if found[0] <= step]
        self._recent.clear()

    def _step(self, event: dict[str, Any]) -> None:
        self.step, self.step_seen = event, time.monotonic()
        self.phase, self.bar = "train", None
        self._recent.append(event)
        if event["loss"] is None:
            return
        self._mean = SMOOTHING * self._mean + (1 - SMOOTHING) * float(event["loss"])
        self._weight = SMOOTHING * self._weight + (1 - SMOOTHING)
        if int(event["step"]) % self._every == 0 or not self.curve:
            self.curve.append((float(event["step"]), self._mean / self._weight))
        if len(self.curve) > MOST_POINTS:
            self.curve, self._every = self.curve[::2], self._every * 2

    def rate(self, key: str) -> float | None:
        """`tokens` or `supervised_tokens` a second, over the last steps."""
        seconds = sum(float(event["seconds"]) for event in self._recent)
        return sum(int(event[key]) for event in self._recent) / seconds if seconds > 0 else None

    @property
    def left(self) -> float | None:
        eta = self.step.get("eta_seconds")
        return max(0.0, float(eta) - (time.monotonic() - self.step_seen)) if eta is not None else None

    @property
    def validation(self) -> dict[str, Any]:
        return self.validations[-1][1] if self.validations else {}


def plan_words(prepared: dict[str, Any]) -> str:
    """The `prepared` event in a sentence."""
    settings = prepared.get("settings") or {}
    held = prepared.get("validation_rows") or 0
    noun = "pair" if settings.get("beta") is not None else "row"  # of answers
    words = f"{plural(int(prepared['train_rows']), noun)} to train on"
    words += f" and {held:,} held out" if held else ""
    words += f"; {int(prepared['tokens']):,} tokens, {int(prepared['supervised_tokens']):,} learnt"
    ratio = prepared.get("tree_ratio")
    words += f", shared prefixes save a factor of {ratio:.2f}" if ratio and ratio >= WORTH_SAYING else ""
    words += f". {plural(int(prepared['steps']), 'step')}"
    if settings:
        words += f" of {plural(int(settings['batch_size']), noun)}, {plural(int(settings['epochs']), 'epoch')}"
        words += f", learning rate {settings['learning_rate']:.2g}, seed {settings['seed']}"
    return words + "."


def forecast_words(forecast: dict[str, Any]) -> str:
    """The `forecast` event in a sentence."""
    memory, disk = size(forecast["peak_memory_bytes"]), size(forecast["disk_bytes"])
    return f"Forecast: {duration(forecast['seconds'])} in all, at most {memory} of memory and {disk} of disk"


class LiveView:
    """Redraws itself in place. Warnings stay above it."""

    def __init__(self, console: Console, request: dict[str, Any], path: str) -> None:
        self.account = Account(request)
        self.path = path
        self.note = ""
        self._live = Live(_Screen(self), console=console, auto_refresh=False, transient=False)
        self._drawn = 0.0
        self._spinner: Spinner | None = None

    def __enter__(self) -> Self:
        self._live.start(refresh=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.refresh()
        self._live.stop()

    def see(self, event: dict[str, Any]) -> None:
        self.account.see(event)
        if event["type"] == "warning":
            words = f"{event['message']} {event.get('hint') or ''}".strip()
            self._live.console.print(Text.assemble(("Warning: ", "bold yellow"), visible(words)))

    def say(self, message: str) -> None:
        self.note = message
        self._live.refresh()

    def tick(self) -> None:
        if time.monotonic() - self._drawn >= REFRESH:
            self._drawn = time.monotonic()
            self._live.refresh()


class _Screen:
    """The live view's picture for whatever size the terminal has now."""

    def __init__(self, view: LiveView) -> None:
        self.view = view
        self.spinners = {False: Spinner("dots", style="cyan"), True: Spinner("line", style="cyan")}

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        account, width = self.view.account, options.max_width
        parts: list[RenderableType] = [self._title(width)]
        if account.step:
            parts.append(self._steps(width, options.ascii_only))
            figures = _figures(account, width)
            under = 1 + bool(self.view.note)
            height = min(14, console.height - len(parts) - figures.row_count - under - 1)
            marks = [(step, float(found["loss"])) for step, found in account.validations if found["loss"] is not None]
            parts += loss_chart(account.curve, marks, min(width, 110), height, options.ascii_only)
            parts.append(figures)
        else:
            parts += self._phases(width, options.ascii_only)
        if self.view.note:
            parts.append(Text(self.view.note, style="yellow", no_wrap=True, overflow="ellipsis"))
        yield Group(*parts)

    def _title(self, width: int) -> Text:
        account = self.view.account
        model = str(account.request.get("model", ""))
        model = model if len(model) <= width // 2 else "…" + model[1 - width // 2 :]
        facts = [str(account.request.get("method", "lora"))]
        if account.prepared:
            facts.append(plural(int(account.prepared["train_rows"]), "row"))
        title = Text(visible(model), style="bold", no_wrap=True, overflow="ellipsis")
        title.append("  " + "  ".join([*facts, visible(self.view.path)]), "not bold dim")
        title.truncate(width, overflow="ellipsis")
        return title

    def _phases(self, width: int, ascii_only: bool) -> list[RenderableType]:
        account = self.view.account
        done, now = account.phases[:-1], account.phases[-1] if account.phases else "Starting the engine"
        tick = "+" if ascii_only else "✓"
        lines: list[RenderableType] = [
            Text(f"{tick} {visible(message)}", style="green", no_wrap=True, overflow="ellipsis") for message in done
        ]
        if account.ended:
            return [*lines, Text(f"  {visible(now)}", no_wrap=True, overflow="ellipsis")]
        row = Table.grid(padding=(0, 1, 0, 0))
        row.add_column(width=1)
        row.add_column(no_wrap=True, overflow="ellipsis", max_width=max(10, width - 24 if account.bar else width - 3))
        cells: list[RenderableType] = [self.spinners[ascii_only], Text(visible(now))]
        if account.bar:
            row.add_column(width=18)
            cells.append(ProgressBar(total=max(1, account.bar[1]), completed=account.bar[0], width=18))
        row.add_row(*cells)
        return [*lines, row]

    def _steps(self, width: int, ascii_only: bool) -> Table:
        account = self.view.account
        step, steps = int(account.step["step"]), int(account.step["steps"])
        words = f"step {step:,} of {steps:,}"
        after = f"{step / max(1, steps):4.0%}"
        if account.phase in WORDS and not account.ended:
            after += f"  {WORDS[account.phase]}"
            if account.bar:
                after += f" {account.bar[0] / max(1, account.bar[1]):.0%}"
        elif account.ended:
            after += f"  {account.ended}"
        elif account.left is not None:
            after += f"  {duration(account.left)} left"
        room = min(width, 110) - len(words) - len(after) - 2
        row = Table.grid(padding=(0, 1, 0, 0))
        for column in (len(words), max(4, room - 1), None):
            row.add_column(width=column, no_wrap=True)
        row.add_row(words, ProgressBar(total=max(1, steps), completed=step, width=max(4, room - 1)), after)
        return row


def _accuracy(validation: dict[str, Any]) -> tuple[str, str]:
    """(label, value) of what a validation counts."""
    if chosen := validation.get("preference"):
        return "pairs right", number(chosen["preference_accuracy"], ".1%")
    return "token accuracy", number(validation.get("token_accuracy"), ".1%")


def _figures(account: Account, width: int) -> Table:
    step, validation, checkpoint = account.step, account.validation, account.checkpoint
    saved = f"{int(checkpoint['step']):,}{' (best)' if checkpoint.get('best') else ''}" if checkpoint else "-"
    pairs = [
        ("loss", number(step.get("loss"), ".4f")),
        ("epoch", number(step.get("epoch"), ".2f")),
        ("tokens/s", number(account.rate("tokens"), ",.0f")),
        ("validation loss", number(validation.get("loss"), ".4f")),
        ("learning rate", number(step.get("learning_rate"), ".2e")),
        ("learnt tokens/s", number(account.rate("supervised_tokens"), ",.0f")),
        _accuracy(validation),
        ("gradient norm", number(step.get("grad_norm"), ".3f")),
        ("memory", size(float(step["memory_bytes"])) if step.get("memory_bytes") else "-"),
        ("checkpoint", saved),
    ]
    if chosen := step.get("preference"):
        pairs[-1:] = [("reward margin", number(chosen["reward_margin"], ".3f")), ("checkpoint", saved)]
    beside = 3 if width >= 84 else 2 if width >= 56 else 1
    if beside == 1:  # room for what matters most
        pairs = [pairs[n] for n in (0, 3, 5, -1)]
    table = Table.grid(padding=(0, 1, 0, 0))
    for _ in range(beside):
        table.add_column(style="dim", no_wrap=True)
        table.add_column(justify="right", no_wrap=True, min_width=9)
        table.add_column(width=1)
    for start in range(0, len(pairs), beside):
        table.add_row(*[cell for pair in pairs[start : start + beside] for cell in (*pair, "")])
    return table


class PlainView:
    """One line for each thing worth a line: at most about twenty for the steps of a run."""

    def __init__(self, request: dict[str, Any], path: str) -> None:
        self.account = Account(request)
        self.path = path
        self._twentieth = -1

    def __enter__(self) -> Self:
        print(f"Run {self.path}: {self.account.request.get('model')}, {self.account.request.get('method', 'lora')}")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass

    def see(self, event: dict[str, Any]) -> None:
        self.account.see(event)
        words = self._words(event)
        if words:
            print(visible(words), flush=True)

    def _words(self, event: dict[str, Any]) -> str | None:
        kind = event["type"]
        if kind == "started" and event.get("resumed_from") is not None:
            return f"Going on after step {event['resumed_from']}."
        if kind == "phase":
            again = event["name"] == "validate" and self.account.step  # its result says enough
            return None if again else f"{event['message']}."
        if kind == "prepared":
            return plan_words(event)
        if kind == "forecast":
            return f"{forecast_words(event)}."
        if kind == "warning":
            return f"Warning: {event['message']} {event.get('hint') or ''}".rstrip()
        if kind == "step":
            return self._step(event)
        if kind == "validation":
            words = ", ".join(map(" ".join, (("loss", number(event["loss"], ".4f")), _accuracy(event))))
            return f"validation at step {event['step']}: {words}"
        if kind == "checkpoint":
            return f"checkpoint at step {event['step']}{' (best)' if event.get('best') else ''}"
        return None

    def _step(self, event: dict[str, Any]) -> str | None:
        step, steps = int(event["step"]), int(event["steps"])
        if 20 * step // steps == self._twentieth:
            return None
        self._twentieth = 20 * step // steps
        words = f"step {step}/{steps}: loss {number(event['loss'], '.4f')}, learning rate {event['learning_rate']:.2e}"
        words += f", {number(self.account.rate('tokens'), ',.0f')} tokens/s"
        return words + (f", {duration(event['eta_seconds'])} left" if event.get("eta_seconds") else "")

    def say(self, message: str) -> None:
        print(message, flush=True)

    def tick(self) -> None:
        pass


class JsonView:
    """Each event as it comes, one object a line."""

    def __init__(self, request: dict[str, Any]) -> None:
        self.account = Account(request)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass

    def see(self, event: dict[str, Any]) -> None:
        print_json(event)

    def say(self, message: str) -> None:
        pass

    def tick(self) -> None:
        pass


def summary(report: dict[str, Any], model: str) -> list[tuple[str, str]]:
    """(label, value) of what a finished run came to."""
    lines = [
        ("training loss", f"{number(report['train_loss_first'], '.4f')} -> {number(report['train_loss_last'], '.4f')}")
    ]
    base, tuned = report.get("base"), report.get("tuned")
    if tuned:
        for key, label, form in (
            ("loss", "validation loss", ".4f"),
            ("token_accuracy", "token accuracy", ".1%"),
            ("exact_match", "exact match", ".1%"),
            ("preference_accuracy", "pairs right", ".1%"),
        ):
            if tuned.get(key) is not None:
                before = f"{number((base or {}).get(key), form)} (base) -> " if base else ""
                lines.append((label, f"{before}{number(tuned[key], form)} (tuned)"))
    if proof := report.get("proof"):
        lines.append(("did it help", proof["sentence"]))
    elif report.get("proof_note"):
        lines.append(("did it help", report["proof_note"]))
    if learnt := report.get("learning"):
        lines.append(("learning curve", Learning(**learnt).sentence))
    if forgotten := report.get("forgetting"):
        lines.append(("forgotten", Forgetting(**forgotten).verdict))
    if kept := report.get("keeping"):
        lines.append(("scale", kept["sentence"]))
    if gate := report.get("gate"):
        kept = "passed: may be promoted" if gate["passed"] else "closed: " + " ".join(gate["reasons"])
        lines.append(("gate", kept))
    tokens = f"{report['trained_tokens']:,} trained on, {report['supervised_tokens']:,} of them learnt"
    lines.append(("tokens", tokens))
    if (report.get("tree_ratio") or 0) >= WORTH_SAYING:
        computed = f"{report['physical_tokens']:,}; shared prefixes save a factor of {report['tree_ratio']:.2f}"
        lines.append(("computed", computed))
    peak = report.get("peak_memory_bytes")
    lines.append(("time", duration(report["seconds"]) + (f", at most {size(peak)} of memory" if peak else "")))
    if forecast := report.get("forecast"):
        words = f"{duration(Forecast(**forecast).seconds)}, at most {size(forecast['peak_memory_bytes'])}"
        lines.append(("foretold", words))
    lines += [(part["name"], _part_words(part)) for part in report.get("parts") or ()]
    lines.append(("model", short(model)))
    return lines


def _part_words(part: dict[str, Any]) -> str:
    """What a part of the run took, beside the forecast and the training."""
    words = duration(part["seconds"])
    words += f"; foretold {duration(part['foretold'])}" if part["foretold"] is not None else ""
    return words if part["name"] == "training" else f"{words}; {part['share']:.0%} of the training's time"
