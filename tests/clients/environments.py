"""Environments of the official clients: one folder a client, made once from the registries and kept.

Each folder is named after the content of what it holds, so a changed version is a new folder. A lock file lets several
test processes ask at once. Does not know: what the tests do with a client.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

# What npm and pip say when there is nobody at the other end of the line.
UNREACHABLE = (
    "Retrying (Retry(",
    "NewConnectionError",
    "Temporary failure in name resolution",
    "Network is unreachable",
    "ENOTFOUND",
    "EAI_AGAIN",
    "ECONNREFUSED",
    "ECONNRESET",
    "ETIMEDOUT",
    "network timeout",
)
PYTHON: dict[str, tuple[str, ...]] = {
    "openai-3.57": ("openai==3.57.0",),
    "openai-2.34": ("openai==2.34.0",),
    "openai-0.28": ("openai==0.28.1", "aiohttp", "pandas", "numpy"),
    "openai-0.27": ("openai==0.27.8", "aiohttp"),
}
NODE: dict[str, Mapping[str, str]] = {"openai-node": {"openai": "7.57.0"}}


@dataclass(frozen=True)
class Client:
    """An environment that is ready: `program` runs scripts, `tool` is its `openai` command (Python clients only)."""

    name: str
    folder: Path
    program: str
    tool: str

    def run(
        self, *command: str, env: Mapping[str, str], stdin: str = "", timeout: float = 120, cwd: Path | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run to the end, with only `env` beside path and locale: nothing of the tests' own environment leaks in."""
        return subprocess.run(
            command, env=clean(env), input=stdin, capture_output=True, text=True, timeout=timeout, cwd=cwd, check=False
        )

    def start(self, *command: str, env: Mapping[str, str], cwd: Path | None = None) -> subprocess.Popen[str]:
        """Start in a process group of its own."""
        pipe = subprocess.PIPE
        return subprocess.Popen(
            command, env=clean(env), stdin=pipe, stdout=pipe, stderr=pipe, text=True, cwd=cwd, start_new_session=True
        )


def clean(env: Mapping[str, str]) -> dict[str, str]:
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "LANG", "TMPDIR") if name in os.environ}
    return {**kept, "PYTHONUNBUFFERED": "1", "PYTHONUTF8": "1", "TZ": "UTC", "NO_PROXY": "127.0.0.1,localhost", **env}


def store() -> Path:
    """Where environments are kept: LUTHIER_TEST_ENVS, else the user's cache."""
    given = os.environ.get("LUTHIER_TEST_ENVS")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(given) if given else cache / "luthier-test-envs"


def environment(name: str) -> Client:
    """The ready environment of this client. Skips the test, saying why, when its registry cannot be reached."""
    content: Any = PYTHON.get(name) or dict(NODE[name])
    maker = sys.version if name in PYTHON else "npm"
    digest = hashlib.sha256(json.dumps([content, maker]).encode()).hexdigest()[:12]
    folder = store() / f"{name}-{digest}"
    ready = folder / ".ready"
    if not ready.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _locked(folder.parent / f"{folder.name}.lock"):
            if not ready.exists():
                shutil.rmtree(folder, ignore_errors=True)  # half made
                (_make_python if name in PYTHON else _make_node)(folder, content)
                ready.touch()
    if name in PYTHON:
        return Client(name, folder, str(folder / "bin" / "python"), str(folder / "bin" / "openai"))
    return Client(name, folder, _node(), "")


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _make_python(folder: Path, requirements: tuple[str, ...]) -> None:
    _install([sys.executable, "-m", "venv", str(folder)])
    pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "-q", "--disable-pip-version-check"]
    _install([*pip, *requirements])


def _make_node(folder: Path, dependencies: Mapping[str, str]) -> None:
    _node()
    folder.mkdir(parents=True)
    (folder / "package.json").write_text(json.dumps({"private": True, "dependencies": dict(dependencies)}))
    _install(["npm", "install", "--no-audit", "--no-fund", "--ignore-scripts", "--prefix", str(folder)])


def _node() -> str:
    found = shutil.which("node")
    if found is None or shutil.which("npm") is None:
        pytest.skip("node and npm are not installed: openai-node cannot be tried")
    return found


def _install(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    if done.returncode == 0:
        return
    said = done.stdout + done.stderr
    if any(sign in said for sign in UNREACHABLE):
        pytest.skip(f"the registry cannot be reached ({Path(command[0]).name}): {said.strip().splitlines()[-1]}")
    raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}:\n{said[-4000:]}")


if __name__ == "__main__":  # make them all beforehand
    for wanted in [*PYTHON, *NODE]:
        print(wanted, environment(wanted).folder)
