"""`make demo`: a real fine-tune on this machine, from nothing to a measured answer to "did it help?".

Starts `luthier serve`, then does with OpenAI's own Python client what one would do with OpenAI: sends the orders data
set (make_data.py), fine-tunes SmolLM2-135M-Instruct on it, asks the base and the tuned model the held-out messages,
and shows both beside what was wanted. Everything it writes is in demo-run/. Exit code 0 only when every step worked
and the tuned model gets at least 85 % of the held-out records right to the last character.

Knows Luthier only as its commands and its API, as you would use them; it imports nothing of it.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

from openai import OpenAI
from rich.box import HORIZONTALS as LINES
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
FOLDER = Path("demo-run")  # below ROOT, where every step is run
MARK = ROOT / FOLDER / ".made-by-luthier-demo"
MODEL = "smollm2-135m-instruct"
DATA, HOME, LOG = FOLDER / "data", FOLDER / "home", FOLDER / "server.log"
EPOCHS, SEED = 2, 7  # two passes are enough and keep the demo short; the seed makes two demos alike
MAX_TOKENS = 64  # more than any record needs
AT_ONCE = 16  # questions in flight; the server answers them together
PASSING = 0.85
SHOWN = 8

console = Console(highlight=False)


class StepFailed(Exception):
    """A step did not work. The message and its own output say why."""

    def __init__(self, message: str, code: int = 1) -> None:
        super().__init__(message)
        self.code = code


def title(number: int, text: str) -> None:
    console.print(f"\n[bold]{number}. {text}[/]")


def say(text: str) -> None:
    console.print(f"[dim]{escape(text)}[/]", soft_wrap=True)


def make_room() -> None:
    """An empty demo-run/. Removes what an earlier demo left there, and nothing else."""
    folder = MARK.parent
    if folder.exists() and any(folder.iterdir()) and not MARK.exists():
        raise SystemExit(f"{folder} holds files that no demo made. Move them away, then try again.")
    folder.mkdir(exist_ok=True)
    MARK.touch()
    for name in ("data", "home", "run"):
        if (folder / name).exists():
            shutil.rmtree(folder / name)


# -- the server --------------------------------------------------------------------------------------------------------


def command(*arguments: str) -> list[str]:
    """A `luthier` command of the environment that this script runs in."""
    return [sys.executable, "-m", "luthier.cli", *arguments]


def output_of(*arguments: str, **environment: str) -> str:
    """What a `luthier` command prints. Raises StepFailed."""
    say(f"$ luthier {' '.join(arguments)}")
    here = {**os.environ, **environment}
    done = subprocess.run(command(*arguments), cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False, env=here)
    if done.returncode:
        raise StepFailed(f"`luthier {' '.join(arguments)}` ended with exit code {done.returncode}.", done.returncode)
    return done.stdout


def base_folder() -> str:
    """Where the base model lies, pulled first when it is not here yet. The server below shares it."""
    output_of("models", "pull", MODEL)
    listed = [json.loads(line) for line in output_of("models", "list", "--json").splitlines()]
    return str(next(model["path"] for model in listed if model["name"] == MODEL))


@contextlib.contextmanager
def server(base: str) -> Iterator[OpenAI]:
    """A server of the demo's own on a free port, and a client of it. Ends with the block."""
    home = {"LUTHIER_HOME": str(ROOT / HOME)}
    key = json.loads(output_of("keys", "create", "demo", "--json", **home))["key"]
    arguments = ["serve", "--port", "0", "--base", f"{MODEL}={base}"]
    say(f"$ luthier {' '.join(arguments)}")
    with open(ROOT / LOG, "w", encoding="utf-8") as log:
        process = subprocess.Popen(
            command(*arguments),
            cwd=ROOT,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **home},
            start_new_session=True,  # Ctrl-C is for the demo, which then ends the server
        )
        try:
            url = _address(process, log)
            say(f"The server listens at {url}")
            yield OpenAI(base_url=f"{url}/v1", api_key=key)
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()


def _address(process: subprocess.Popen[str], log: IO[str]) -> str:
    """Where the server says that it listens; what else it says goes to the log. Raises StepFailed."""
    assert process.stderr is not None
    for line in process.stderr:
        log.write(line)
        if found := re.search(r"listens at (http\S+?)\.?\s", line):
            threading.Thread(target=shutil.copyfileobj, args=(process.stderr, log), daemon=True).start()
            return found[1]
    raise StepFailed(f"The server did not start; see {LOG}.", process.wait() or 1)


# -- training ----------------------------------------------------------------------------------------------------------


def tune(client: OpenAI) -> str:
    """The name of the model tuned on the training messages. Raises StepFailed."""
    with open(ROOT / DATA / "train.jsonl", "rb") as handle:
        file = client.files.create(file=handle, purpose="fine-tune")
    job = client.fine_tuning.jobs.create(
        model=MODEL,
        training_file=file.id,
        suffix="orders",
        seed=SEED,
        method={"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": EPOCHS}}},
    )
    say(f"{file.id}: {file.bytes:,} bytes sent; {job.id} asked for.")
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[loss]}"), TimeRemainingColumn())
    seen: set[str] = set()
    with Progress(*columns, console=console) as bars:
        bar = bars.add_task("training", total=None, loss="")
        while True:
            job = client.fine_tuning.jobs.retrieve(job.id)
            for event in reversed(client.fine_tuning.jobs.list_events(job.id, limit=100).data):
                if event.id in seen:
                    continue
                seen.add(event.id)
                data: dict[str, Any] = event.data if isinstance(event.data, dict) else {}
                if event.type == "metrics" and "step" in data:
                    loss = f"loss {data['train_loss']:.3f}"
                    bars.update(bar, completed=data["step"], total=data.get("total_steps"), loss=loss)
                else:
                    bars.console.print(f"[dim]{escape(event.message)}[/]", soft_wrap=True)
            if job.status in ("succeeded", "failed", "cancelled"):
                break
            time.sleep(1)
    if job.fine_tuned_model is None:
        raise StepFailed(f"The job ended as {job.status}: {job.error.message if job.error else 'nobody says why'}")
    return job.fine_tuned_model


# -- the exam ----------------------------------------------------------------------------------------------------------


def held_out() -> list[tuple[list[dict[str, str]], str]]:
    """(messages, the record wanted) for each held-out message."""
    lines = (ROOT / DATA / "held-out.jsonl").read_text(encoding="utf-8").splitlines()
    turns = [json.loads(line)["messages"] for line in lines]
    return [(row[:-1], row[-1]["content"]) for row in turns]


def answers_of(client: OpenAI, model: str, exam: list[tuple[list[dict[str, str]], str]]) -> list[str]:
    """What `model` answers to each, at temperature 0, many at a time."""

    def ask(messages: Any) -> str:
        answer = client.chat.completions.create(
            model=model, messages=messages, temperature=0, max_completion_tokens=MAX_TOKENS
        )
        return answer.choices[0].message.content or ""

    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bars, ThreadPoolExecutor(AT_ONCE) as pool:
        return list(bars.track(pool.map(ask, [row[0] for row in exam]), total=len(exam), description=escape(model)))


def one_line(text: str, limit: int = 120) -> str:
    shown = " / ".join(text.split("\n"))
    return escape(shown if len(shown) <= limit else shown[: limit - 1] + "…")


def shown_answers(exam: list[tuple[list[dict[str, str]], str]], base: list[str], tuned: list[str]) -> Table:
    """Held-out messages with the record wanted and what each model said."""
    table = Table(title=f"The first {SHOWN} held-out messages", title_justify="left", show_header=False, box=LINES)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for (messages, wanted), before, after in list(zip(exam, base, tuned, strict=True))[:SHOWN]:
        colour, tick = ("green", "✓") if after == wanted else ("red", "✗")
        table.add_row("customer", f"[bold]{one_line(messages[-1]['content'])}[/]")
        table.add_row("wanted", one_line(wanted))
        table.add_row("[dim]base[/]", f"[dim]{one_line(before)}[/]")
        table.add_row(f"[{colour}]tuned  {tick}[/]", f"[{colour}]{one_line(after)}[/]", end_section=True)
    return table


def is_json(text: str) -> bool:
    with contextlib.suppress(ValueError):
        return isinstance(json.loads(text), dict)
    return False


def share(hits: list[bool]) -> float:
    return sum(hits) / len(hits)


def scores(wanted: list[str], base: list[str], tuned: list[str]) -> Table:
    table = Table(title=f"Measured on {len(wanted)} held-out messages", title_justify="left", box=LINES)
    for name in ("", "before", "after"):
        table.add_column(name, justify="right" if name else "left")
    right = [share([said == want for said, want in zip(each, wanted, strict=True)]) for each in (base, tuned)]
    table.add_row("records right to the last character", *(f"{value:.1%}" for value in right))
    table.add_row(
        "answers that are a JSON object", *(f"{share(list(map(is_json, each))):.1%}" for each in (base, tuned))
    )
    return table


def what_next(tuned: str) -> None:
    console.print("\n[bold]Try next[/]  (after [bold]source .venv/bin/activate[/])")
    home = f"LUTHIER_HOME={HOME}"
    for words, why in (
        (f"{home} luthier keys create me", "a key: put it into OPENAI_API_KEY"),
        (f"{home} luthier serve", "the same server again; the tuned model is still there"),
        (f"luthier chat {tuned} --server http://127.0.0.1:8080", "send the tuned model an order of yours"),
        (f"luthier train --model {MODEL} --data YOURS.jsonl", "tune without a server, on your own file"),
    ):
        console.print(f"  {words}\n      [dim]{why}[/]", soft_wrap=True)


def demo() -> int:
    """All steps in order. Returns the exit code."""
    make_room()
    title(1, "The base model, and a server that offers it")
    with server(base_folder()) as client:
        begun = time.monotonic()
        title(2, "The data: messages to a small shop, and the order record wanted for each")
        subprocess.run([sys.executable, str(HERE / "make_data.py"), "--out", str(DATA)], cwd=ROOT, check=True)
        title(3, "Training")
        model = tune(client)
        title(4, "Did it help? Both models answer messages that neither was trained on")
        exam = held_out()
        base, tuned = answers_of(client, MODEL, exam), answers_of(client, model, exam)
    minutes, seconds = divmod(round(time.monotonic() - begun), 60)
    console.print(shown_answers(exam, base, tuned))
    wanted = [row[1] for row in exam]
    console.print(scores(wanted, base, tuned))
    console.print(f"Data, training and both evaluations took {minutes} min {seconds} s.")
    if share([said == want for said, want in zip(tuned, wanted, strict=True)]) < PASSING:
        console.print(f"[red]The tuned model was to get {PASSING:.0%} of the records right.[/]")
        return 1
    what_next(model)
    return 0


def main() -> None:
    try:
        sys.exit(demo())
    except StepFailed as failure:
        console.print(f"[red]{escape(str(failure))}[/] The demo ends here.")
        sys.exit(failure.code)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
