"""`luthier data prepare`: prompts and completions made ready for a fine-tune, as `prepare_data` did.

Asks before each recommended mend. Does not know: the checks (data/prepare.py).
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from luthier.cli.output import console, plural, print_json, short, typed, visible
from luthier.spec.errors import UserError

if TYPE_CHECKING:
    from luthier.data.prepare import Pairs, Prepared


def prepare(
    file: Annotated[Path, typer.Argument(help="A .csv, .tsv, .json, .jsonl or .txt file.")],
    yes: Annotated[bool, typer.Option("--yes", "-q", help="Make every recommended mend without asking.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object; makes every mend.")] = False,
) -> None:
    """Check prompts and completions, mend them, and write them as JSON Lines beside the file.

    Data to classify is split into a part to train on and a part to measure on. The file itself is not changed.
    """
    from luthier.data.prepare import examine
    from luthier.data.table import read_table

    prepared = examine(read_table(file))
    ask = Asking(yes or as_json)
    out = console(stderr=as_json)
    for finding in prepared.findings:
        done = f" Mended: {finding.mend}." if finding.necessary else ""
        out.print(visible(f"- {finding.text}{done}"), markup=False, soft_wrap=True)
    mended = []
    for finding in prepared.recommended:
        if finding.apply is not None and ask(f"Recommended: {finding.mend}."):
            prepared.pairs = finding.apply(prepared.pairs)
            mended.append(finding.mend)
    parts = {"": prepared.pairs}
    if prepared.task == "classification" and ask("Recommended: split into rows to train on and rows to measure on."):
        parts = _split(prepared.pairs)
    files = _written(file, parts) if mended or prepared.changed or len(parts) > 1 else [file]
    command = _command(prepared, files)
    if as_json:
        findings = [{"text": each.text, "mend": each.mend or None} for each in prepared.findings]
        print_json(
            {
                "rows": len(prepared.pairs),
                "task": prepared.task,
                "findings": findings,
                "files": [str(path) for path in files],
                "command": command,
            }
        )
        return
    _say(prepared, files, parts, command)


class Asking:
    """Whether somebody agrees; anything but n does. Raises UserError when nobody can be asked."""

    def __init__(self, always: bool) -> None:
        self.always = always

    def __call__(self, question: str) -> bool:
        if self.always:
            print(visible(f"{question} Done."), file=sys.stderr)
            return True
        print(visible(f"{question} [Y/n] "), end="", file=sys.stderr, flush=True)
        answer = sys.stdin.readline()
        if not answer:
            raise UserError("Nobody answers here.", hint="Give --yes to make every recommended mend.", param="yes")
        return answer.strip().lower() != "n"


def _split(pairs: Pairs) -> dict[str, Pairs]:
    from luthier.data.prepare import split

    train, valid = split(pairs)
    return {"_train": train, "_valid": valid}


def _written(file: Path, parts: dict[str, Pairs]) -> list[Path]:
    from luthier.data.prepare import new_names, write

    names = new_names(file, list(parts))
    for name, pairs in zip(names, parts.values(), strict=True):
        write(name, pairs)
    return names


def _command(prepared: Prepared, files: list[Path]) -> str:
    """What to type next. Classification metrics are the older API's, so it is the older client's command."""
    from luthier.data.prepare import classes

    if len(files) == 1:
        return typed("luthier", "jobs", "create", "--model", "MODEL", "--training-file", short(files[0]))
    words = ["openai", "api", "fine_tunes.create", "-t", short(files[0]), "-v", short(files[1])]
    words.append("--compute_classification_metrics")
    found = classes(prepared.pairs)
    if len(found) == 2:
        words += ["--classification_positive_class", found[0][0]]
    else:
        words += ["--classification_n_classes", str(len(found))]
    return typed(*words)


def _say(prepared: Prepared, files: list[Path], parts: dict[str, Pairs], command: str) -> None:
    for path, pairs in zip(files, parts.values(), strict=True):
        print(visible(f"{short(path)}: {plural(len(pairs), 'row')}"))
    print(visible(f"Train with: {command}"))
    if prepared.prompt_ending:
        print(visible(f"When you ask the tuned model, end each prompt with {prepared.prompt_ending!r}."))
    if prepared.completion_ending:
        print(visible(f"Its answers end with stop={[prepared.completion_ending]!r}."))
