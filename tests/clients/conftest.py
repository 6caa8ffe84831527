"""The servers that real clients speak to, and what the clients' own scripts reported. One of each a test process.

Everything that takes long is begun once and in the background: jobs by submit.py, scripts in lanes side by side; a
test waits for its part. Does not know: what the checks are.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

from tests import tiny as tiny_models
from tests.clients import rows
from tests.clients.environments import Client, environment
from tests.clients.served import Server

COOKBOOK = {
    "toy": "toy_chat_fine_tuning.jsonl",
    "drone": "drone_training.jsonl",
    "transactions": "labelled_transactions.csv",
}
SCRIPTS = Path(__file__).parent / "scripts"
DATA = Path(__file__).parents[3] / "shared" / "data" / "openai"  # the cookbook's files, where they are at hand
REAL = "smollm2-135m-instruct"
# Scripts of one lane run one after another, lanes side by side. "*" marks a lane that needs the real model.
LANES: tuple[tuple[tuple[str, str], ...], ...] = (
    (("files.py", "openai-3.57"), ("files.py", "openai-2.34"), ("jobs.py", "openai-3.57"), ("jobs.py", "openai-2.34")),
    (("life.py", "openai-3.57"),),
    (("cookbook.py", "openai-3.57"),),
    (("node.mjs", "openai-node"),),
    (("idle.py", "openai-3.57"),),
    (("idle.py", "openai-2.34"),),
    (("legacy.py", "openai-0.28"), ("legacy.py", "openai-0.27")),
)
REAL_LANES: tuple[tuple[tuple[str, str], ...], ...] = (
    (
        ("inference.py", "openai-3.57"),
        ("together.py", "openai-3.57"),
        ("inference.py", "openai-2.34"),
        ("together.py", "openai-2.34"),
    ),
)


def run_script(client: Client, script: str, server: Server, given: dict[str, Any]) -> dict[str, Any]:
    """Check name -> outcome, as harness.py and node.mjs print them."""
    told = {**given, "environment": str(client.folder), "mark": client.name}
    command = [client.program, str(SCRIPTS / script), json.dumps(told)]
    done = client.run(*command, env=server.variables(), timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    outcome: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return outcome


class Reports:
    """What scripts reported, each run when its lane comes to it; only those that `wanted` holds."""

    def __init__(
        self,
        lanes: tuple[tuple[tuple[str, str], ...], ...],
        server: Server,
        given: dict[str, Any],
        wanted: set[tuple[str, str]],
    ) -> None:
        self._futures: dict[tuple[str, str], Future[dict[str, Any]]] = {}
        for lane in lanes:
            mine = [one for one in lane if one in wanted]
            self._futures |= {one: Future() for one in mine}
            clients = {name: environment(name) for _, name in mine}
            threading.Thread(target=self._walk, args=(mine, clients, server, given), daemon=True).start()

    def _walk(
        self, lane: list[tuple[str, str]], clients: dict[str, Client], server: Server, given: dict[str, Any]
    ) -> None:
        for script, name in lane:
            future = self._futures[script, name]
            try:
                future.set_result(run_script(clients[name], script, server, given))
            except BaseException as error:  # noqa: BLE001 - the test that waits raises it
                future.set_exception(error)

    def of(self, script: str, client: str) -> dict[str, Any]:
        return self._futures[script, client].result(timeout=900)


def wanted(request: pytest.FixtureRequest) -> set[tuple[str, str]]:
    """The (script, client) pairs that this run's tests ask for."""
    calls = [getattr(item, "callspec", None) for item in request.session.items]
    return {
        (call.params["script"], call.params["client"])
        for call in calls
        if call and {"script", "client"} <= call.params.keys()
    }


@pytest.fixture(scope="session")
def small_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random base for which the cookbook's rows are no longer than for a real one."""
    drone = DATA / "drone_training.jsonl"
    more = tuple(drone.read_text().splitlines()[:20]) if drone.exists() else ()
    return tiny_models.make_model(
        tmp_path_factory.mktemp("base") / "tiny",
        max_positions=4096,
        corpus=(*tiny_models.CORPUS, *more),
        entries=1000 if more else 400,
    )


@pytest.fixture(scope="session")
def server(small_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A running `luthier serve` that offers `tiny`, with two workers."""
    words = ("--base", f"tiny={small_base}", "--alias", "gpt-3.5-turbo=tiny", "--alias", "ada=tiny", "--workers", "2")
    with Server(tmp_path_factory.mktemp("served") / "home", *words) as server:
        yield server


@pytest.fixture(scope="session")
def real_server(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A running `luthier serve` that offers the real 135M model and trains nothing."""
    words = ("--base", f"{REAL}={smollm2}", "--no-worker")
    with Server(tmp_path_factory.mktemp("real") / "home", *words) as server:
        yield server


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Paths of the files that scripts upload by name."""
    folder = tmp_path_factory.mktemp("data")
    contents = {
        "train": ("train.jsonl", rows.jsonl(rows.chat())),
        "valid": ("valid.jsonl", rows.jsonl(rows.chat(4, first=20))),
        "pairs": ("pairs.jsonl", rows.jsonl(rows.completions())),
    }
    paths = {}
    for name, (filename, content) in contents.items():
        (folder / filename).write_bytes(content)
        paths[name] = str(folder / filename)
    for name, filename in COOKBOOK.items():
        if (DATA / filename).exists():
            paths[name] = str(DATA / filename)
    return paths


@pytest.fixture(scope="session")
def given(server: Server, data: dict[str, str]) -> dict[str, Any]:
    """What scripts are told: the files' paths, and the jobs that the official client has just begun."""
    client = environment("openai-3.57")
    command = [client.program, str(SCRIPTS / "submit.py"), json.dumps(data), str(Path(__file__).parent)]
    done = client.run(*command, env=server.variables())
    assert done.returncode == 0, done.stdout + done.stderr
    return {**data, **json.loads(done.stdout)}


@pytest.fixture(scope="session")
def reports(server: Server, given: dict[str, Any], request: pytest.FixtureRequest) -> Reports:
    """What the scripts reported that the small base is enough for."""
    status, job = server.ask(
        "POST",
        "/v1/fine-tunes",
        {"training_file": server.upload(rows.jsonl(rows.completions()), "p.jsonl"), "model": "ada", "n_epochs": 1},
    )
    assert status == 200, job
    return Reports(LANES, server, {**given, "legacy_job": job["id"]}, wanted(request))


@pytest.fixture(scope="session")
def real_reports(real_server: Server, smollm2: Path, request: pytest.FixtureRequest) -> Reports:
    """What the scripts reported that need a model that can follow a grammar to its end."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(smollm2 / "tokenizer.json"))
    asked = {
        "model": REAL,
        "messages": [{"role": "user", "content": "What is the capital of France? One word."}],
        "max_tokens": 1,
        "temperature": 0,
        "logprobs": True,
    }
    status, answer = real_server.ask("POST", "/v1/chat/completions", asked)
    assert status == 200, answer
    greedy = answer["choices"][0]["logprobs"]["content"][0]["token"]
    ids = {
        "greedy": tokenizer.encode(greedy, add_special_tokens=False).ids,
        "forced": tokenizer.encode(" cat", add_special_tokens=False).ids,
        "text": " cat",
    }
    return Reports(REAL_LANES, real_server, {"model": REAL, "ids": ids}, wanted(request))
