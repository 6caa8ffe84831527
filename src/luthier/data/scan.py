"""A file to columns: every record is read, looked at, sketched and, with a model, tokenised; in spans, on all cores.

JSON Lines are cut into spans of whole lines that processes read by themselves; what comes back are numbers and a few
example rows. Other layouts go through this process, some thousand records at a time. Memory: the columns (310 bytes a
row) and, for each process, one span of records.
Does not know: what the numbers mean together (doctor.py).
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from luthier.data import conversions, cookbook
from luthier.data.columns import Columns, joined
from luthier.data.formats import read_examples
from luthier.data.look import Look
from luthier.data.pairs import Meaning
from luthier.data.read import is_plain_text, read_records, read_span
from luthier.data.render import Renderer
from luthier.data.rows import RowReader, kind_of
from luthier.data.spans import count_lines, line_spans
from luthier.data.template import ChatTemplate
from luthier.data.tokenizer import Tokenizer
from luthier.spec.data import Example, Problem

Progress = Callable[[int, int], None]  # (bytes done, bytes in all)
SPAN = 4 << 20  # bytes of a file that one process reads at a time
PART = 4096  # records between which a stream's numbers go into columns
_FEWEST_SPANS = 4  # below, starting processes takes longer than the work


@dataclass(frozen=True, slots=True)
class Plan:
    """How a file is to be looked at; small, and the same in every process."""

    path: Path
    format: str | None
    format_line: int
    max_length: int | None
    folder: Path | None = None
    template: tuple[str, str, dict[str, str]] | None = None
    prompt_weight: float = 0.0


def scan(
    path: Path,
    renderer: Renderer | None = None,
    max_length: int | None = None,
    progress: Progress | None = None,
    processes: int | None = None,
) -> Columns:
    """The columns of one file. `processes`: None for as many as this process may use cores. Raises NotFound."""
    conversion = conversions.of_table(path) if path.is_file() else None
    if conversion is not None:
        return Columns(records=conversion.rows, conversion=conversion)
    whole = _scan(path, renderer, max_length, progress, processes)
    if whole.format is None and whole.records and "invalid" in whole.tallies:
        options = conversions.of_records(path)
        if options is not None:
            whole.conversion = conversions.Conversion("JSON of another shape", whole.records, options)
    elif whole.format == "moss":
        whole.conversion = conversions.Conversion("MOSS plug-in records", whole.examples, "--to chat")
    return whole


def _scan(
    path: Path,
    renderer: Renderer | None,
    max_length: int | None,
    progress: Progress | None,
    processes: int | None,
) -> Columns:
    plan = _plan(path, renderer, max_length)
    spans = line_spans(path, SPAN)
    if not spans:
        return joined(list(_stream(plan, Look(path.name, renderer, max_length), progress)))
    many = min(processes or len(os.sched_getaffinity(0)), len(spans))
    total = path.stat().st_size
    parts = []
    if many < 2 or len(spans) < _FEWEST_SPANS:
        look = Look(path.name, renderer, max_length)
        results: Iterable[Columns] = (_span(plan, look, span) for span in spans)
    else:
        results = _in_processes(plan, spans, many)
    for span, part in zip(spans, results, strict=True):
        parts.append(part)
        if progress is not None:
            progress(span[1], total)
    whole = joined(parts)
    if not whole.records:
        whole.problems += [item for item in read_records(path) if isinstance(item, Problem)]  # says why
        whole.tally("unreadable", 0, "no records")
    return whole


def _plan(path: Path, renderer: Renderer | None, max_length: int | None) -> Plan:
    """The format is that of the first record which has one, wherever a span begins."""
    format, line = None, 0
    if not is_plain_text(path):
        for item in read_records(path):
            if not isinstance(item, Problem) and (found := kind_of(item.value)) is not None:
                format, line = found, item.line
                break
    plan = Plan(path, format, line, max_length)
    if renderer is None:
        return plan
    template = renderer.template
    recipe = (template.source, template.name, template.variables)
    return replace(plan, folder=renderer.tokenizer.folder, template=recipe, prompt_weight=renderer.prompt_weight)


# -- in other processes ------------------------------------------------------------------------------------------------

_HERE: list[tuple[Plan, Look]] = []  # what a process was started with


def _in_processes(plan: Plan, spans: list[tuple[int, int]], many: int) -> Iterator[Columns]:
    """Results in order; no more than twice as many spans as processes are under way."""
    context = multiprocessing.get_context("spawn")  # a fork would copy locks that other threads hold
    pool = ProcessPoolExecutor(many, context, initializer=_start, initargs=(plan,))
    try:
        waiting: deque[Future[Columns]] = deque()
        for span in spans:
            with _deaf():
                waiting.append(pool.submit(_work, span))
            if len(waiting) >= 2 * many:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)  # after Ctrl-C only the spans under way are waited for


@contextlib.contextmanager
def _deaf() -> Iterator[None]:
    """Processes started inside hear no Ctrl-C, not even before `_start`: each would print where it was."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start(plan: Plan) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to hear, which then ends these
    renderer = None
    if plan.folder is not None and plan.template is not None:
        renderer = Renderer(Tokenizer(plan.folder), ChatTemplate(*plan.template), plan.prompt_weight)
    _HERE[:] = [(plan, Look(plan.path.name, renderer, plan.max_length))]


def _end_with_parent() -> None:
    """A pool's process holds both ends of its queue, so it would wait for ever for a parent that was killed."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _work(span: tuple[int, int]) -> Columns:
    return _span(*_HERE[0], span)


# -- records to columns ------------------------------------------------------------------------------------------------


def _span(plan: Plan, look: Look, span: tuple[int, int]) -> Columns:
    part = Columns(format=plan.format, lines=count_lines(plan.path, *span))
    reader = RowReader(plan.path.name, plan.format, plan.format_line)

    def examples() -> Iterator[Meaning]:
        for item in read_span(plan.path, *span):
            part.records += 1
            if isinstance(item, Problem):
                look.unreadable(part, item)
                continue
            part.cookbook.update(cookbook.errors(item.value))
            part.cookbook.update(cookbook.missing(item.value))
            yield from look.row(part, reader.read(item))

    look.fill(part, examples())
    part.unknown = reader.unknown
    return part


def _stream(plan: Plan, look: Look, progress: Progress | None) -> Iterator[Columns]:
    """Parts of a file that is read from its beginning to its end."""
    if is_plain_text(plan.path):
        part = Columns(format="text")
        look.fill(part, look.read(part, _counted(part, read_examples(plan.path, progress))))
        yield part
        return
    reader = RowReader(plan.path.name, plan.format, plan.format_line)
    records = read_records(plan.path, progress)
    done, ended = 0, False

    def examples(part: Columns) -> Iterator[Meaning]:
        nonlocal ended
        for item in records:
            part.records = max(part.records, item.row - done)
            part.cut_short = isinstance(item, Problem)
            if isinstance(item, Problem):
                look.unreadable(part, replace(item, row=max(0, item.row - done)))
            else:
                part.cookbook.update(cookbook.errors(item.value))
                part.cookbook.update(cookbook.missing(item.value))
                yield from look.row(part, reader.read(replace(item, row=item.row - done)))
            if part.records >= PART:
                return
        ended = True

    while not ended:
        part = Columns(format=plan.format)
        reader.reader.unknown = {}
        look.fill(part, examples(part))
        part.unknown = reader.unknown
        done += part.records
        yield part


def _counted(part: Columns, items: Iterable[Example | Problem]) -> Iterator[Example | Problem]:
    for item in items:
        part.records += not isinstance(item, Problem)
        yield item
