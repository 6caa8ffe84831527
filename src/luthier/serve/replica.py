"""A replica: one base model in a process of its own, spoken to in lines of JSON (spec/serving.py).

    python -m luthier.serve.replica --base FOLDER [--adapters N] [--precision float32] ...

A thread reads lines, one prepares asks (adapters from disk, grammars), this one computes. Only protocol lines reach
stdout: whatever libraries print there goes to stderr. Ends when stdin ends.
Does not know: HTTP, who asks, text.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier.settings import bound_kernel_caches, sleep_between_kernels
from luthier.spec.errors import Broken, LuthierError, UserError
from luthier.spec.serving import Ask, Part

if TYPE_CHECKING:
    from luthier.serve.grammar import Grammars
    from luthier.serve.lora import Shelf
    from luthier.serve.scheduler import Scheduler

Work = tuple[str, Any]  # what to do, with what
TOGETHER = 0.002  # seconds; asks that come so soon after each other begin in one step


class Out:
    """Protocol lines, whole, on the real stdout."""

    def __init__(self) -> None:
        sys.stdout.flush()
        self._fd = os.dup(1)
        os.dup2(2, 1)
        self._lock = threading.Lock()
        self._held: list[bytes] = []

    def part(self, part: Part) -> None:
        """Held until `flush`, so that the parts of a step are written at once."""
        self._held.append(part.model_dump_json(exclude_defaults=True).encode() + b"\n")

    def flush(self) -> None:
        held, self._held = self._held, []
        if held:
            self._write(b"".join(held))

    def line(self, value: dict[str, Any]) -> None:
        self._write(json.dumps(value, ensure_ascii=False).encode() + b"\n")

    def failed(self, name: str, error: LuthierError) -> None:
        part = Part(id=name, finish="error", error=error.as_dict())
        self._write(part.model_dump_json(exclude_defaults=True).encode() + b"\n")

    def _write(self, data: bytes) -> None:
        with self._lock:
            view = memoryview(data)
            while view:
                view = view[os.write(self._fd, view) :]


class Reader:
    """Lines of stdin -> work. Asks go to `prepare` first; a cancelled one is dropped there."""

    def __init__(self, inbox: queue.SimpleQueue[Work], out: Out) -> None:
        self.inbox, self.out = inbox, out
        self.asks: queue.SimpleQueue[Ask] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._preparing: set[str] = set()
        self._cancelled: set[str] = set()

    def read(self) -> None:
        """Until stdin ends. Reads the descriptor itself: an exit must not wait for a buffered reader's lock."""
        rest = b""
        while data := os.read(0, 2**16):
            *lines, last = data.split(b"\n")
            if lines:
                lines[0], rest = rest + lines[0], b""
            rest += last
            for line in lines:
                if line.strip():
                    self._line(line)
        self.inbox.put(("end", None))

    def _line(self, line: bytes) -> None:
        name = None
        try:
            value = json.loads(line)
            if not isinstance(value, dict):
                raise ValueError("found no JSON object")
            do = value.pop("do", None)
            name = value.get("id") if isinstance(value.get("id"), str) else None
            if do == "generate":
                ask = Ask.model_validate(value)
                with self._lock:
                    self._preparing.add(ask.id)
                self.asks.put(ask)
            elif do in ("cancel", "stats") and name is not None:
                self._other(do, name)
            elif do == "ping":  # by this thread: one that computes or loads for long is well
                self.out.line({"alive": True})
            else:
                raise ValueError(f"found do {do!r}; wanted ping, or generate, cancel or stats with an id")
        except (ValueError, RecursionError) as error:
            found = UserError(f"A line that is no ask: {str(error)[:500]}")
            if name is None:
                self.out.line({"error": found.as_dict()})
            else:
                self.out.failed(name, found)

    def _other(self, do: str, name: str) -> None:
        with self._lock:
            if do == "cancel" and name in self._preparing:
                self._cancelled.add(name)
                return
        self.inbox.put((do, name))

    def prepare(self, ready: Callable[[Ask], Work]) -> None:
        """For ever: `ready` turns an ask into work."""
        while True:
            ask = self.asks.get()
            try:
                work = ready(ask)
            except LuthierError as error:
                work = ("failed", (ask.id, error))
            except (OSError, RuntimeError, ValueError, KeyError) as error:  # one ask's trouble is not the others'
                work = ("failed", (ask.id, Broken(f"The ask could not be prepared: {error}")))
            with self._lock:
                self._preparing.discard(ask.id)
                if ask.id in self._cancelled:
                    self._cancelled.discard(ask.id)
                    work = ("gone", ask.id)
            self.inbox.put(work)


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m luthier.serve.replica", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--base", type=Path, required=True, help="folder of the base model")
    parser.add_argument("--adapters", type=int, default=32, help="adapters held in memory at once")
    parser.add_argument("--precision", choices=["bfloat16", "float32"], help="default: what this machine is good at")
    parser.add_argument("--rows", type=int, default=32, help="sequences computed together at most")
    parser.add_argument("--kv-tokens", type=int, help="tokens whose keys and values are held; default: by memory")
    parser.add_argument("--prefix-mb", type=int, default=512, help="memory for remembered prefixes")
    return parser.parse_args(given)


def main() -> None:
    options = arguments()
    out = Out()
    bound_kernel_caches()  # these two before torch is imported
    sleep_between_kernels()
    inbox: queue.SimpleQueue[Work] = queue.SimpleQueue()
    reader = Reader(inbox, out)
    threading.Thread(target=reader.read, daemon=True).start()
    try:
        scheduler, shelf, grammars, ready = _load(options, out)
    except LuthierError as error:
        out.line({"ready": False, "error": error.as_dict()})
        raise SystemExit(error.exit_code) from error

    def prepared(ask: Ask) -> Work:
        scheduler.check(ask)
        adapter = shelf.get(Path(ask.adapter), ask.digest) if ask.adapter is not None else None
        matcher = grammars.matcher(ask.grammar, ask.stop_ids) if ask.grammar is not None else None
        return ("generate", (ask, adapter, matcher))

    threading.Thread(target=reader.prepare, args=(prepared,), daemon=True).start()
    out.line(ready)
    try:
        _serve(scheduler, shelf, inbox, out)
    except BrokenPipeError:
        raise SystemExit(0) from None


def _load(options: argparse.Namespace, out: Out) -> tuple[Scheduler, Shelf, Grammars, dict[str, Any]]:
    import functools

    import torch

    from luthier.engine import catalogue, models
    from luthier.engine.generate import context_of
    from luthier.serve import compute
    from luthier.serve.grammar import Grammars
    from luthier.serve.lora import Shelf
    from luthier.serve.scheduler import Scheduler

    torch.set_grad_enabled(False)
    precision = options.precision or models.processor_precision()
    model = models.load_base(options.base, precision).eval().requires_grad_(False)
    memory = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    way = compute.choose(model, options.kv_tokens, options.prefix_mb * 2**20, memory)
    context = context_of(model)
    kv_tokens = options.kv_tokens or way.budget
    scheduler = Scheduler(way, context, kv_tokens, options.rows, out.part)
    base_hash = functools.cache(lambda: catalogue.content_hash(options.base))
    shelf = Shelf(model, way.weight_of, base_hash, way.modules, options.adapters)
    grammars = Grammars(options.base / "tokenizer.json", way.vocabulary)
    ready = {
        "ready": True,
        "decoder": way.name,
        "precision": precision,
        "context": context,
        "vocabulary": way.vocabulary,
        "kv_tokens": kv_tokens,
    }
    return scheduler, shelf, grammars, ready


def _serve(scheduler: Scheduler, shelf: Shelf, inbox: queue.SimpleQueue[Work], out: Out) -> None:
    """Until stdin ends: take what came in, compute a step, write what it gave."""
    while True:
        begins = not scheduler.busy
        while work := _come(inbox, scheduler, begins):
            do, what = work
            if do == "end":
                return
            _do(do, what, scheduler, shelf, out)
            out.flush()
        try:
            scheduler.step()
        except (RuntimeError, MemoryError) as error:  # torch out of memory and the like: say it, go on
            print(f"a step failed: {error!r}", file=sys.stderr, flush=True)
            scheduler.fail_all(Broken(f"The model could not go on: {error}"))
        out.flush()


def _come(inbox: queue.SimpleQueue[Work], scheduler: Scheduler, begins: bool) -> Work | None:
    """What to do next; None: compute. Before the first step of many, those are waited for who come at the same time."""
    if not scheduler.busy:
        return inbox.get()
    try:
        wait = begins and len(scheduler.waiting) < scheduler.most
        return inbox.get(timeout=TOGETHER) if wait else inbox.get_nowait()
    except queue.Empty:
        return None


def _do(do: str, what: Any, scheduler: Scheduler, shelf: Shelf, out: Out) -> None:
    if do == "generate":
        ask, adapter, matcher = what
        try:
            scheduler.add(ask, adapter, matcher)
        except LuthierError as error:
            out.failed(ask.id, error)
    elif do == "cancel":
        scheduler.cancel(what)
    elif do == "gone":
        out.part(Part(id=what, finish="cancelled"))
    elif do == "failed":
        out.failed(*what)
    else:
        out.line(
            {
                "id": what,
                "running": len(scheduler.rows),
                "waiting": len(scheduler.waiting),
                "steps": scheduler.steps,
                "adapters": len(shelf),
            }
        )


if __name__ == "__main__":
    main()
