"""How `luthier jobs follow` shows a server's job: live on a terminal, lines elsewhere, the server's events as JSON.

Asks for what is newer than the last event it has; a server that does not answer is asked again until it does.
Does not know: how a job is carried out, HTTP.
"""

from __future__ import annotations

import contextlib
import shlex
import time
from typing import TYPE_CHECKING, Any, Protocol

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from luthier.cli.chart import Point, loss_chart
from luthier.cli.output import console, duration, number, print_error, print_json, visible
from luthier.spec.errors import Broken, NotNow, UserError

if TYPE_CHECKING:
    from luthier.cli.client import Client

POLL = 1.0  # seconds between two looks at a job
LONGEST_WAIT = 10.0  # seconds between two looks at a server that does not answer
INTERRUPTED = 130
ENDS = {"succeeded": 0, "cancelled": NotNow.exit_code, "paused": NotNow.exit_code}
SHOWN_EVENTS = 6


def reward_words(metrics: dict[str, Any], before: str) -> str:
    """What a step of method dpo shows beside its loss, each part with `before` in front; "" of other methods.

    The reward accuracy is the share of the pairs whose preferred answer has gained on the other one.
    """
    names = {"train": "reward accuracy", "full_valid": "validation reward accuracy"}
    found = {name: metrics.get(f"{part}_reward_accuracy") for part, name in names.items()}
    return "".join(f"{before}{name} {value:.1%}" for name, value in found.items() if value is not None)


class Watched:
    """What is known of a job from its events so far."""

    def __init__(self, job: dict[str, Any]) -> None:
        self.job = job
        self.step: dict[str, Any] = {}
        self.curve: list[Point] = []
        self.marks: list[Point] = []
        self.messages: list[str] = []
        self.last: str | None = None
        self._first: tuple[int, float] | None = None

    def see(self, event: dict[str, Any]) -> None:
        self.last = event["id"]
        data = event.get("data") or {}
        if event.get("type") != "metrics" or data.get("step") is None:
            self.messages.append(event["message"])
            return
        if self.step and data["step"] <= self.step["step"]:  # an attempt that goes on from a checkpoint
            self.curve = [point for point in self.curve if point[0] < data["step"]]
            self.marks = [point for point in self.marks if point[0] < data["step"]]
            self._first = None
        self.step = {**data, "at": event["created_at"]}
        self._first = self._first or (data["step"], event["created_at"])
        if data.get("train_loss") is not None:
            self.curve.append((float(data["step"]), float(data["train_loss"])))
        loss = data.get("full_valid_loss", data.get("valid_loss"))
        if loss is not None:
            self.marks.append((float(data["step"]), float(loss)))

    @property
    def steps(self) -> int | None:
        total = self.step.get("total_steps")
        return int(total) if total else None

    @property
    def left(self) -> float | None:
        """Seconds to the last step, by the pace so far."""
        if self._first is None or self.steps is None or self.job["status"] != "running":
            return None
        done = self.step["step"] - self._first[0]
        spent = self.step["at"] - self._first[1]
        return (self.steps - self.step["step"]) * spent / done if done > 0 and spent > 0 else None


class View(Protocol):
    """Whoever shows a job."""

    def event(self, event: dict[str, Any]) -> None: ...

    def note(self, words: str) -> None: ...

    def tick(self) -> None: ...


class Lines:
    """A line for each message, and about twenty for the steps."""

    def __init__(self, watched: Watched) -> None:
        self.watched = watched
        self._twentieth = -1

    def event(self, event: dict[str, Any]) -> None:
        data = event.get("data") or {}
        if event.get("type") != "metrics" or data.get("step") is None:
            print(visible(event["message"]), flush=True)
            return
        step, steps = data["step"], self.watched.steps
        twentieth = 20 * step // steps if steps else step // 10
        loss = data.get("full_valid_loss", data.get("valid_loss"))
        if twentieth == self._twentieth and loss is None:
            return
        self._twentieth = twentieth
        words = f"step {step}{f'/{steps}' if steps else ''}: loss {number(data.get('train_loss'), '.4f')}"
        words += f", validation loss {number(loss, '.4f')}" if loss is not None else ""
        words += reward_words(data, ", ")
        left = self.watched.left
        print(words + (f", {duration(left)} left" if left is not None else ""), flush=True)

    def note(self, words: str) -> None:
        console(stderr=True).print(visible(words), markup=False, soft_wrap=True)

    def tick(self) -> None:
        pass


class JsonLines(Lines):
    """The server's events, one object a line."""

    def event(self, event: dict[str, Any]) -> None:
        print_json(event)


class Screen:
    """Redraws itself in place: title, bar, loss curve, the last messages."""

    def __init__(self, watched: Watched, out: Console) -> None:
        self.watched = watched
        self.words = ""
        self.live = Live(self, console=out, auto_refresh=False, transient=False)

    def event(self, event: dict[str, Any]) -> None:
        del event

    def note(self, words: str) -> None:
        self.words = words
        self.live.refresh()

    def tick(self) -> None:
        self.live.refresh()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        watched, width = self.watched, min(options.max_width, 110)
        job = watched.job
        title = Text(visible(str(job.get("fine_tuned_model") or job["model"])), "bold")
        title.append(visible(f"  {job['id']}  {job['status']}"), "not bold dim")
        parts: list[RenderableType] = [_one_line(title)]
        messages = [_one_line(Text(visible(message), "dim")) for message in watched.messages[-SHOWN_EVENTS:]]
        if watched.step:
            parts.append(self._bar(width))
            height = min(14, console.height - len(messages) - 4)
            parts += loss_chart(watched.curve, watched.marks, width, height, options.ascii_only)
        parts += messages
        if self.words:
            parts.append(_one_line(Text(visible(self.words), "yellow")))
        yield Group(*parts)

    def _bar(self, width: int) -> RenderableType:
        watched = self.watched
        step, steps = watched.step["step"], watched.steps
        loss = number(watched.step.get("train_loss"), ".4f")
        words = f"step {step:,}" + (f" of {steps:,}" if steps else "") + f"  loss {loss}"
        words += reward_words(watched.step, "  ")
        after = f"{duration(watched.left)} left" if watched.left is not None else ""
        if steps is None:
            return Text(words)
        row = Table.grid(padding=(0, 1, 0, 0))
        room = max(4, width - len(words) - len(after) - 3)
        for column in (len(words), room, None):
            row.add_column(width=column, no_wrap=True)
        row.add_row(words, ProgressBar(total=steps, completed=step, width=room), after)
        return row


def _one_line(text: Text) -> Text:
    text.no_wrap, text.overflow = True, "ellipsis"
    return text


def watch(client: Client, path: str, after: str | None, as_json: bool, server: str | None = None) -> int:
    """Show the job at `path` until it ends; the exit code. `server`: the option --server, for the word on how to go on.

    Raises what the first request raises.
    """
    watched = Watched(client.get(path))
    watched.last = after
    out = console()
    screen = Screen(watched, out) if out.is_terminal and not as_json else None
    view: View = screen or (JsonLines(watched) if as_json else Lines(watched))
    try:
        with screen.live if screen else contextlib.nullcontext():
            _to_the_end(client, path, watched, view)
            view.tick()
    except KeyboardInterrupt:
        job = watched.job["id"]
        since = f" --after {watched.last}" if watched.last and screen is None else ""  # a curve wants its beginning
        there = f" --server {shlex.quote(server)}" if server else ""
        Lines(watched).note(f"The job goes on. Follow it again with: luthier jobs follow {job}{since}{there}")
        return INTERRUPTED
    return _ended(watched.job, as_json)


def _to_the_end(client: Client, path: str, watched: Watched, view: View) -> None:
    wait = POLL
    while True:
        try:
            job = client.get(path)  # before the events: the one that tells of an end is there when the end is
            fresh = _newer(client, path, watched.last)
        except NotNow as error:
            view.note(f"{error.message} Trying again.")
            wait = min(2 * wait, LONGEST_WAIT)
            time.sleep(wait)
            continue
        if wait != POLL:
            view.note("The server answers again.")
            wait = POLL
        watched.job = job
        for event in fresh:
            watched.see(event)
            view.event(event)
        view.tick()
        if job["status"] in ("succeeded", "failed", "cancelled", "paused"):
            return
        time.sleep(POLL)


def _newer(client: Client, path: str, last: str | None) -> list[dict[str, Any]]:
    """The events behind `last`, oldest first. Lists come newest first."""
    found: list[dict[str, Any]] = []
    for event in client.pages(f"{path}/events", None):
        if event["id"] == last:
            break
        found.append(event)
    return found[::-1]


def _ended(job: dict[str, Any], as_json: bool) -> int:
    """The last word on a job, and the exit code that belongs to it."""
    status = str(job["status"])
    if as_json:
        print_json(job)
    if status in ENDS:
        words = {
            "succeeded": f"Tuned model: {job.get('fine_tuned_model')}",
            "cancelled": "The job was cancelled.",
            "paused": f"The job is paused. Go on with: luthier jobs resume {job['id']}",
        }[status]
        if not as_json:
            print(visible(words), flush=True)
        return ENDS[status]
    error = job.get("error") or {}
    if not as_json:
        print_error(f"The job failed: {error.get('message') or 'the server does not say why'}")
    return UserError.exit_code if error.get("param") else Broken.exit_code
