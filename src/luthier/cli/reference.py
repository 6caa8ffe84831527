"""`python -m luthier.cli.reference` prints docs/cli.md, made from the commands themselves.

The same text whatever the terminal. Does not know: what any command does.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import typer.main

HEAD = """# The command line

Made from the code by `make docs`; a test compares the two. `luthier COMMAND --help` says the same in the terminal.

Results go to stdout, progress and errors to stderr. With `--json` an error is the last line of stdout:
`{"status": "failed", "code", "message", "hint", "param", "problems"}`.

| exit code | meaning |
|---|---|
| 0 | done |
| 1 | our own fault, or the machine's |
| 2 | the request or the data is wrong: correct it and ask again |
| 75 | the right request at the wrong moment: disk full, no source answers, in use, a run stopped before its end |
| 130 | ended by Ctrl-C |
"""

KINDS: dict[Any, str] = {int: "N", float: "X", Path: "PATH"}


def reference() -> str:
    """The whole page."""
    from luthier.cli import app

    sections = [HEAD.rstrip()]
    sections += [
        "\n".join(_section(words, command)) for words, command in _commands("luthier", typer.main.get_command(app))
    ]
    return "\n\n".join(sections) + "\n"


def _commands(words: str, command: Any) -> Iterator[tuple[str, Any]]:
    """Every command below `command` with the words that call it, in the order of the help."""
    yield words, command
    for name, below in getattr(command, "commands", {}).items():
        yield from _commands(f"{words} {name}", below)


def _section(words: str, command: Any) -> Iterator[str]:
    yield f"## `{words}`"
    yield ""
    yield _paragraphs(command.help or "")
    below = getattr(command, "commands", {})
    options = [parameter for parameter in command.params if parameter.param_type_name == "option"]
    arguments = [parameter for parameter in command.params if parameter.param_type_name == "argument"]
    if not below:
        usage = " ".join(
            [words, *(_argument_name(argument) for argument in arguments), *(["[OPTIONS]"] if options else [])]
        )
        yield from ("", f"    {usage}")
    if below:
        yield from ("", "| command | what it does |", "|---|---|")
        for name, child in below.items():
            first = _paragraphs(child.help or "").split("\n\n")[0]
            yield f"| `{words} {name}` | {_cell(first)} |"
    if arguments:
        yield from ("", "| argument | meaning |", "|---|---|")
        for argument in arguments:
            yield f"| `{_argument_name(argument)}` | {_cell(_meaning(argument))} |"
    if options:
        yield from ("", "| option | meaning |", "|---|---|")
        for option in options:
            yield f"| {_option_name(option)} | {_cell(_meaning(option))} |"


def _argument_name(argument: Any) -> str:
    name = str(argument.metavar or argument.name).upper()
    name += "..." if argument.nargs == -1 else ""
    return name if argument.required else f"[{name}]"


def _option_name(option: Any) -> str:
    """`--epochs N|auto`, with the bar escaped for a Markdown table."""
    names = ", ".join(f"`{name}`" for name in [*option.opts, *option.secondary_opts])
    if option.is_flag:
        return names
    kind = getattr(getattr(option, "type_descriptor", None), "annotation", None)
    choices = "|".join(map(str, get_args(kind))) if get_origin(kind) is Literal else ""
    value = option.metavar or choices or KINDS.get(kind, "TEXT")
    again = " (repeatable)" if option.multiple else ""
    return f"{names} `{_cell(value)}`{again}"


def _meaning(parameter: Any) -> str:
    words = str(getattr(parameter, "help", None) or "")
    default = parameter.default
    plain = (
        default is not None
        and default is not ...
        and not callable(default)
        and not getattr(parameter, "is_flag", False)
    )
    if parameter.required and parameter.param_type_name == "option":
        words += " Required."
    elif plain and default not in ([], (), "") and parameter.show_default and "Default:" not in words:
        words += f" Default: {default}."
    return words


def _paragraphs(text: str) -> str:
    """Wrapped source lines joined; blank lines stay."""
    return "\n\n".join(" ".join(part.split()) for part in re.split(r"\n\s*\n", text.strip()))


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


if __name__ == "__main__":
    print(reference(), end="")
