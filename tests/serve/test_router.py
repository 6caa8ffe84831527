"""Replicas as the router sees them: started, waited for, lost, replaced. The child is a small script."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from luthier.serve import router as room
from luthier.serve.router import Router
from luthier.settings import Settings
from luthier.spec.serving import Ask, Part

# What its prompt's first token says is what it does.
SCRIPT = """
import json, os, sys, threading, time
folder = sys.argv[1]
open(os.path.join(folder, "starts"), "a").write("x")
if os.path.exists(os.path.join(folder, "broken")):
    print(json.dumps({"ready": False, "error": {"message": "no weights"}}), flush=True)
    sys.exit(2)
if os.path.exists(os.path.join(folder, "slow")):
    time.sleep(0.5)
def say(value):
    sys.stdout.write(json.dumps(value) + "\\n"); sys.stdout.flush()
say({"ready": True})
for line in sys.stdin:
    ask = json.loads(line)
    if ask["do"] == "ping":
        say({"alive": True})
        continue
    open(os.path.join(folder, "said"), "a").write(ask["do"] + "\\n")
    if ask["do"] != "generate":
        continue
    name, what = ask["id"], ask["prompt"][0]
    say({"id": name, "tokens": [{"id": os.getpid() % 1000}], "generated": 1})
    if what == 0:
        say({"id": name, "finish": "stop", "generated": 2})
    elif what == 1:
        os._exit(9)
    elif what == 2:
        sys.stdout.write("Traceback: oh\\n"); sys.stdout.flush()
    elif what == 3:
        sys.stdout.write('{"id": "' + name); sys.stdout.flush(); os._exit(0)
    elif what == 4:
        for n in range(20000):
            say({"id": name, "tokens": [{"id": n}], "generated": n})
    elif what == 5:
        pass
    elif what == 6:
        threading.Timer(0.3, lambda: say({"id": name, "finish": "stop"})).start()
"""
DONE, DIES, GARBAGE, CUT, FLOOD, SILENT, LATER = range(7)

Play = Callable[..., AsyncIterator[Router]]


def folders(tmp_path: Path, *names: str) -> dict[str, Path]:
    made = {name: tmp_path / name for name in names}
    for folder in made.values():
        folder.mkdir()
    return made


@asynccontextmanager
async def playing(tmp_path: Path, places: dict[str, Path], replicas: int = 2) -> AsyncIterator[Router]:
    script = tmp_path / "child.py"
    script.write_text(SCRIPT)

    def command(folder: Path, adapters: int) -> Sequence[str]:
        return [sys.executable, str(script), str(folder), str(adapters)]

    router = Router(Settings(home=tmp_path / "home", hub="off", replicas=replicas), places, command=command)
    await router.start()
    try:
        yield router
    finally:
        await router.close()


async def parts_of(router: Router, base: str, what: int, name: str = "a") -> list[Part]:
    return [part async for part in router.generate(base, Ask(id=name, prompt=[what], max_tokens=9))]


def starts(folder: Path) -> int:
    path = folder / "starts"
    return len(path.read_text()) if path.exists() else 0


async def until(true: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not true():
            await asyncio.sleep(0.01)


def test_one_process_answers_all_and_starts_when_asked(tmp_path: Path) -> None:
    async def play() -> None:
        places = folders(tmp_path, "b")
        (places["b"] / "slow").touch()
        async with playing(tmp_path, places) as router:
            assert not router.ready("b")
            assert starts(places["b"]) == 0
            both = await asyncio.gather(*(parts_of(router, "b", DONE, f"n{n}") for n in range(8)))
            assert [[part.finish for part in parts] for parts in both] == [[None, "stop"]] * 8
            assert router.ready("b")
            assert starts(places["b"]) == 1
        assert not router.ready("b")

    asyncio.run(play())


@pytest.mark.parametrize("what", [DIES, GARBAGE, CUT])
def test_a_lost_process_ends_what_was_in_flight_and_another_comes(tmp_path: Path, what: int) -> None:
    async def play() -> None:
        places = folders(tmp_path, "b")
        async with playing(tmp_path, places) as router, asyncio.timeout(20):
            waiting = asyncio.create_task(parts_of(router, "b", SILENT, "waits"))
            await until(lambda: (places["b"] / "said").exists())
            lost = await parts_of(router, "b", what)
            assert [part.finish for part in lost] == [None, "error"]
            assert (lost[-1].error or {})["code"] == ("internal" if what == GARBAGE else "unavailable")
            assert [part.finish for part in await waiting] == [None, "error"]
            again = await parts_of(router, "b", DONE)
            assert again[-1].finish == "stop"
            assert starts(places["b"]) == 2

    asyncio.run(play())


def test_a_process_killed_between_asks_is_replaced(tmp_path: Path) -> None:
    async def play() -> None:
        places = folders(tmp_path, "b")
        async with playing(tmp_path, places) as router, asyncio.timeout(20):
            await parts_of(router, "b", DONE)
            router._replicas["b"].kill()
            await until(lambda: not router.ready("b"))
            assert (await parts_of(router, "b", DONE))[-1].finish == "stop"

    asyncio.run(play())


@pytest.mark.parametrize("loading", [False, True])
def test_a_process_that_is_stopped_is_found_out_and_replaced(
    loading: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "PING_SECONDS", 0.05)
    monkeypatch.setattr(room, "SILENT_PINGS", 20)
    monkeypatch.setattr(room, "SILENT_PINGS_LOADING", 100)

    async def play() -> None:
        places = folders(tmp_path, "b")
        if loading:
            (places["b"] / "slow").touch()
        async with playing(tmp_path, places) as router, asyncio.timeout(30):
            waiting = [asyncio.create_task(parts_of(router, "b", SILENT, f"waits{n}")) for n in range(3)]
            seen = "starts" if loading else "said"
            await until(lambda: (places["b"] / seen).exists())
            (places["b"] / "slow").unlink(missing_ok=True)
            os.kill(router._replicas["b"].process.pid, signal.SIGSTOP)
            ends = [(await one)[-1] for one in waiting]
            assert {(end.error or {})["message"] for end in ends} == {"The model's process did not answer any more."}
            router._failures.clear()  # one that was stopped while it loaded counts as one that did not come up
            assert (await parts_of(router, "b", DONE))[-1].finish == "stop"
            assert starts(places["b"]) == 2

    asyncio.run(play())


def test_a_process_that_answers_its_pings_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "PING_SECONDS", 0.05)
    monkeypatch.setattr(room, "SILENT_PINGS", 20)

    async def play() -> None:
        places = folders(tmp_path, "b")
        async with playing(tmp_path, places) as router, asyncio.timeout(30):
            waiting = asyncio.create_task(parts_of(router, "b", SILENT))
            await until(lambda: (places["b"] / "said").exists())
            await asyncio.sleep(0.05 * 30)
            assert router.ready("b") and not waiting.done()

    asyncio.run(play())


def test_a_model_that_cannot_be_loaded_is_said_and_not_tried_at_once_again(tmp_path: Path) -> None:
    async def play() -> None:
        places = folders(tmp_path, "b")
        (places["b"] / "broken").touch()
        async with playing(tmp_path, places) as router:
            for _ in range(3):
                (part,) = await parts_of(router, "b", DONE)
                assert part.error is not None
                assert part.error["message"] == "The model cannot be loaded: no weights"
            assert starts(places["b"]) == 1
            (part,) = await parts_of(router, "nobody", DONE)
            assert (part.error or {})["code"] == "not_found"

    asyncio.run(play())


def test_closing_the_iterator_cancels(tmp_path: Path) -> None:
    async def play() -> None:
        places = folders(tmp_path, "b")
        async with playing(tmp_path, places) as router:
            parts = router.generate("b", Ask(id="a", prompt=[SILENT], max_tokens=9))
            assert (await anext(parts)).generated == 1
            await parts.aclose()
            said = places["b"] / "said"
            await until(lambda: said.read_text() == "generate\ncancel\n")
            await parts_of(router, "b", DONE)
            assert said.read_text() == "generate\ncancel\ngenerate\n"

    asyncio.run(play())


def test_a_reader_that_sleeps_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "BUFFER", 50)

    async def play() -> None:
        places = folders(tmp_path, "b")
        async with playing(tmp_path, places) as router:
            parts = router.generate("b", Ask(id="a", prompt=[FLOOD], max_tokens=9))
            await anext(parts)
            await until(lambda: "cancel" in (places["b"] / "said").read_text())
            rest = [part async for part in parts]
            assert len(rest) <= 51
            assert "too slowly" in ((rest[-1].error or {})["message"] or "")

    asyncio.run(play())


def test_room_is_made_for_another_base(tmp_path: Path) -> None:
    async def play() -> None:
        places = folders(tmp_path, "a", "b", "c")
        async with playing(tmp_path, places, replicas=2) as router, asyncio.timeout(20):
            await parts_of(router, "a", DONE)
            await parts_of(router, "b", DONE)
            await parts_of(router, "a", DONE)
            whole = f"folder:{places['c']}"
            assert (await parts_of(router, whole, DONE))[-1].finish == "stop"
            assert [router.ready(name) for name in ("a", "b", whole)] == [True, False, True]

    asyncio.run(play())


def test_a_busy_base_ends_its_answers_before_it_makes_room(tmp_path: Path) -> None:
    async def play() -> None:
        places = folders(tmp_path, "a", "b")
        async with playing(tmp_path, places, replicas=1) as router, asyncio.timeout(20):
            busy = asyncio.create_task(parts_of(router, "a", LATER))
            await until(lambda: (places["a"] / "said").exists())
            assert (await parts_of(router, "b", DONE))[-1].finish == "stop"
            assert (await busy)[-1].finish == "stop"
            assert (await parts_of(router, "a", DONE))[-1].finish == "stop"
            assert starts(places["a"]) == 2

    asyncio.run(play())


def test_close_ends_what_is_in_flight(tmp_path: Path) -> None:
    async def play() -> None:
        places = folders(tmp_path, "b")
        async with playing(tmp_path, places) as router:
            waiting = asyncio.create_task(parts_of(router, "b", SILENT))
            await until(lambda: (places["b"] / "said").exists())
            began = time.monotonic()
            await router.close()
            assert (await waiting)[-1].finish == "error"
            assert time.monotonic() - began < room.GRACE + 5
            assert (await parts_of(router, "b", DONE))[-1].finish == "error"

    asyncio.run(play())
