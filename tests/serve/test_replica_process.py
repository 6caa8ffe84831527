"""The replica as a process: lines in, lines out, and nothing that a caller sends ends it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from luthier.settings import SPINS, sleep_between_kernels
from luthier.spec.serving import Part
from tests.serve.replicas import Bench, ask, make_adapter

PROMPT = [(7 * n + 3) % 300 for n in range(20)]


class Replica:
    def __init__(self, base: Path, *more: str, early: Sequence[dict[str, Any]] = ()) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "luthier.serve.replica", "--base", str(base), "--precision", "float32", *more],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        assert self.process.stdin and self.process.stdout
        self.stdin, self.stdout = self.process.stdin, self.process.stdout
        self.say(*early)
        self.ready = self.line()  # the first

    def line(self) -> dict[str, Any]:
        value = json.loads(self.stdout.readline())
        assert isinstance(value, dict)
        return value

    def end(self, code: int) -> None:
        """Close its stdin; it must leave with `code`."""
        _, errors = self.process.communicate(timeout=20)
        assert self.process.returncode == code, errors.decode()

    def say(self, *lines: dict[str, Any] | bytes) -> None:
        for line in lines:
            self.stdin.write(line if isinstance(line, bytes) else json.dumps(line).encode() + b"\n")
        self.stdin.flush()

    def until(self, *names: str) -> dict[str, list[Part]]:
        """Parts by id until each of `names` has ended."""
        parts: dict[str, list[Part]] = {name: [] for name in names}
        open_ones = set(names)
        while open_ones:
            part = Part.model_validate(self.line())
            parts.setdefault(part.id, []).append(part)
            if part.finish:
                open_ones.discard(part.id)
        return parts


def generate(name: str, prompt: list[int], **more: Any) -> dict[str, Any]:
    return {"do": "generate", **ask(name, prompt, **more).model_dump()}


@pytest.fixture(scope="module")
def replica(tiny: Path) -> Iterator[Replica]:
    made = Replica(tiny)
    yield made
    made.end(0)


def ids(parts: list[Part]) -> list[int]:
    return [token.id for part in parts for token in part.tokens]


def test_ready_says_how(replica: Replica) -> None:
    assert replica.ready["ready"] is True
    assert (replica.ready["decoder"], replica.ready["precision"]) == ("lean", "float32")
    assert replica.ready["context"] == 512


def test_answers_and_adapters(replica: Replica, tiny: Path, tmp_path: Path) -> None:
    adapter = make_adapter(tiny, tmp_path / "a", 1)
    replica.say(generate("base", PROMPT), generate("tuned", PROMPT, adapter=str(adapter), digest="d"))
    given = replica.until("base", "tuned")
    wanted = Bench(tiny).run([ask("base", PROMPT), ask("tuned", PROMPT, adapter=str(adapter))])
    for name in ("base", "tuned"):
        assert ids(given[name]) == wanted[name].ids
        assert given[name][-1].generated == 12
        assert given[name][-1].finish == "length"


def test_broken_lines_end_nothing(replica: Replica, tmp_path: Path) -> None:
    replica.say(b"no json\n", b"\xff\xfe\n", b"[1]\n", b"\n", b"[" * 100_000 + b"\n", {"do": "dance", "id": "x"})
    errors = [replica.line() for _ in range(5)]
    assert sum("error" in line for line in errors) == 5
    assert errors[-1]["id"] == "x"
    replica.say(
        {"do": "generate", "id": "none"},
        generate("strange", PROMPT) | {"colour": "red"},
        generate("far", [10**9]),
        generate("long", [1] * 600),
        generate("lost", PROMPT, adapter=str(tmp_path / "nothing")),
        generate("schema", PROMPT, stop_ids=[2], grammar={"json_schema": {"type": "nonsense"}}),
    )
    given = replica.until("none", "strange", "far", "long", "lost", "schema")
    codes = {name: (parts[-1].error or {})["code"] for name, parts in given.items()}
    assert codes == {
        "none": "invalid_request",
        "strange": "invalid_request",
        "far": "invalid_request",
        "long": "context_length_exceeded",
        "lost": "not_found",
        "schema": "invalid_request",
    }
    assert (given["schema"][-1].error or {})["param"] == "response_format"
    replica.say(generate("after", PROMPT))
    assert replica.until("after")["after"][-1].finish == "length"


def test_cancel_frees_and_stats_tell(replica: Replica) -> None:
    replica.say(generate("gone", PROMPT, max_tokens=490), {"do": "cancel", "id": "gone"})
    assert replica.until("gone")["gone"][-1].finish in ("cancelled", "length")
    replica.say(generate("gone", PROMPT, max_tokens=490))
    first = Part.model_validate(replica.line())
    assert first.finish is None
    replica.say({"do": "cancel", "id": "gone"}, {"do": "cancel", "id": "nobody"})
    assert replica.until("gone")["gone"][-1].finish == "cancelled"
    replica.say({"do": "stats", "id": "s"})
    stats = replica.line()
    assert (stats["id"], stats["running"], stats["waiting"]) == ("s", 0, 0)


def test_a_ping_is_answered_while_it_loads_and_while_it_computes(tiny: Path) -> None:
    made = Replica(tiny, early=[{"do": "ping"}])
    assert made.ready == {"alive": True}
    assert made.line()["ready"] is True
    made.say(generate("long", PROMPT, max_tokens=490, logit_bias={2: -100}), {"do": "ping"})
    lines = [made.line()]
    while "alive" not in lines[-1]:
        lines.append(made.line())
    assert len(lines) < 400
    made.end(0)


def test_an_unusable_base_is_said(tmp_path: Path) -> None:
    made = Replica(tmp_path)
    made.end(2)
    assert made.ready["ready"] is False
    assert made.ready["error"]["message"]


def test_no_other_output(tiny: Path) -> None:
    """What libraries print goes to stderr; a single stop of stdin ends the process."""
    done = subprocess.run(
        [sys.executable, "-m", "luthier.serve.replica", "--base", str(tiny), "--precision", "float32"],
        input=json.dumps(generate("a", PROMPT, max_tokens=1)).encode(),  # no newline at the end
        capture_output=True,
        timeout=60,
        env={**os.environ, "TRANSFORMERS_VERBOSITY": "info"},
    )
    assert done.returncode == 0
    assert json.loads(done.stdout.splitlines()[0])["ready"] is True


def test_how_threads_wait_is_the_users_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.delenv(name, raising=False)
    sleep_between_kernels()
    assert (os.environ["OMP_WAIT_POLICY"], os.environ["GOMP_SPINCOUNT"]) == ("passive", SPINS)
    monkeypatch.setenv("GOMP_SPINCOUNT", "7")
    monkeypatch.delenv("OMP_WAIT_POLICY")
    sleep_between_kernels()
    assert os.environ["GOMP_SPINCOUNT"] == "7"
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    monkeypatch.delenv("GOMP_SPINCOUNT")
    sleep_between_kernels()
    assert os.environ["OMP_WAIT_POLICY"] == "active"
    assert "GOMP_SPINCOUNT" not in os.environ
