"""`make demo`: a real fine-tune on this machine, from nothing to a measured answer to "did it help?".

Pulls SmolLM2-135M-Instruct, writes the orders data set (make_data.py), trains, asks the base and the tuned model the
held-out messages, and shows both beside what was wanted. Everything it writes is in demo-run/. Exit code 0 only when
every step worked and the tuned model gets at least 85 % of the held-out records right to the last character.

Knows Luthier only as its commands, as you would use them; it imports nothing of it.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import IO, Any

from rich.box import HORIZONTALS as LINES
from rich.console import Console
from rich.markup import escape
from rich.table import Table

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
FOLDER = Path("demo-run")  # below ROOT, where every step is run
MARK = ROOT / FOLDER / ".made-by-luthier-demo"
MODEL = "smollm2-135m-instruct"
TRAIN, HELD_OUT, RUN = FOLDER / "data/train.jsonl", FOLDER / "data/held-out.jsonl", FOLDER / "run"
# Two passes are enough and keep the demo short. The seed makes two demos alike.
OPTIONS = ["--epochs", "2", "--seed", "7"]
PASSING = 0.85
SHOWN = 8

console = Console(highlight=False)


class StepFailed(Exception):
    """A step ended with an exit code other than 0. Its own output has said why."""

    def __init__(self, command: list[str], code: int) -> None:
        super().__init__(f"`{' '.join(command)}` ended with exit code {code}.")
        self.code = code


def run(command: list[str], stdout: IO[bytes] | None = None) -> None:
    """Run one step on this terminal. Raises StepFailed.

    Ctrl-C reaches the step too, which then stops cleanly: so wait for it, as subprocess.run would not.
    """
    interrupted = False
    with subprocess.Popen(command, cwd=ROOT, stdout=stdout) as child:
        while True:
            try:
                code = child.wait()
                break
            except KeyboardInterrupt:
                interrupted = True
    said = [Path(command[0]).name, *command[1:]]
    if code or interrupted:
        raise StepFailed(said, code or 130)


def luthier(*arguments: str, stdout: IO[bytes] | None = None) -> None:
    """A `luthier` command of the environment that this script runs in."""
    console.print(f"[dim]$ luthier {' '.join(arguments)}[/]", soft_wrap=True)
    run([str(Path(sys.executable).with_name("luthier")), *arguments], stdout)


def title(number: int, text: str) -> None:
    console.print(f"\n[bold]{number}. {text}[/]")


def make_room() -> None:
    """An empty demo-run/. Removes what an earlier demo left there, and nothing else."""
    folder = MARK.parent
    if folder.exists() and any(folder.iterdir()) and not MARK.exists():
        raise SystemExit(f"{folder} holds files that no demo made. Move them away, then try again.")
    folder.mkdir(exist_ok=True)
    MARK.touch()
    for name in ("data", "run"):
        if (folder / name).exists():
            shutil.rmtree(folder / name)


def evaluate() -> dict[str, Any]:
    """What `luthier evaluate --json` measured: base, tuned (spec/report.py's Score) and samples."""
    path = ROOT / FOLDER / "evaluation.json"
    with open(path, "wb") as handle:
        luthier("evaluate", str(RUN), "--data", str(HELD_OUT), "--json", stdout=handle)
    measured: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return measured


def messages() -> dict[str, str]:
    """The customer's message for each held-out record; no two rows have the same record."""
    lines = (ROOT / HELD_OUT).read_text(encoding="utf-8").splitlines()
    turns = [json.loads(line)["messages"] for line in lines]
    return {row[-1]["content"]: row[-2]["content"] for row in turns}


def one_line(text: str | None, limit: int = 120) -> str:
    shown = " / ".join((text or "").split("\n"))
    return escape(shown if len(shown) <= limit else shown[: limit - 1] + "…")


def answers(samples: list[dict[str, Any]]) -> Table:
    """Held-out messages with the record wanted and what each model said."""
    wrote = messages()
    table = Table(
        title=f"The first {len(samples)} held-out messages", title_justify="left", show_header=False, box=LINES
    )
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for sample in samples:
        right = sample["tuned"] == sample["wanted"]
        colour, tick = ("green", "✓") if right else ("red", "✗")
        table.add_row("customer", f"[bold]{one_line(wrote.get(sample['wanted'], sample['prompt']))}[/]")
        table.add_row("wanted", one_line(sample["wanted"]))
        table.add_row("[dim]base[/]", f"[dim]{one_line(sample['base'])}[/]")
        table.add_row(f"[{colour}]tuned  {tick}[/]", f"[{colour}]{one_line(sample['tuned'])}[/]", end_section=True)
    return table


def scores(base: dict[str, Any], tuned: dict[str, Any]) -> Table:
    table = Table(title=f"Measured on {tuned['rows']} held-out messages", title_justify="left", box=LINES)
    for name in ("", "before", "after"):
        table.add_column(name, justify="right" if name else "left")
    for label, key, form in (
        ("records right to the last character", "exact_match", "{:.1%}"),
        ("tokens of the right answer predicted", "token_accuracy", "{:.1%}"),
        ("loss (nats per token)", "loss", "{:.3f}"),
    ):
        cells = [form.format(score[key]) if score[key] is not None else "not measured" for score in (base, tuned)]
        table.add_row(label, *cells)
    return table


def what_next() -> None:
    console.print("\n[bold]Try next[/]  (after [bold]source .venv/bin/activate[/])")
    for command, why in (
        (f"luthier chat {RUN}", "send the tuned model an order of yours"),
        (f"luthier data show {TRAIN} --model {MODEL}", "see which tokens were learnt"),
        (f"luthier train --model {MODEL} --data YOURS.jsonl", "tune it on your own file"),
    ):
        console.print(f"  {command}\n      [dim]{why}[/]", soft_wrap=True)


def demo() -> int:
    """All steps in order. Returns the exit code."""
    make_room()
    title(1, "The base model")
    luthier("models", "pull", MODEL)
    begun = time.monotonic()
    title(2, "The data: messages to a small shop, and the order record wanted for each")
    run([sys.executable, str(HERE / "make_data.py"), "--out", str(TRAIN.parent)])
    title(3, "Training")
    luthier("train", "--model", MODEL, "--data", str(TRAIN), "--out", str(RUN), *OPTIONS)
    title(4, "Did it help? Both models answer messages that neither was trained on")
    measured = evaluate()
    minutes, seconds = divmod(round(time.monotonic() - begun), 60)
    console.print(answers(measured["samples"][:SHOWN]))
    console.print(scores(measured["base"], measured["tuned"]))
    console.print(f"Data, training and both evaluations took {minutes} min {seconds} s.")
    reached = measured["tuned"]["exact_match"]
    if reached is None or reached < PASSING:
        console.print(f"[red]The tuned model was to get {PASSING:.0%} of the records right.[/]")
        return 1
    what_next()
    return 0


def main() -> None:
    try:
        sys.exit(demo())
    except StepFailed as failure:
        console.print(f"[red]{escape(str(failure))}[/] The demo ends here.")
        sys.exit(failure.code)


if __name__ == "__main__":
    main()
