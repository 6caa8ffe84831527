"""`luthier train`: options to a request, a run folder, an engine process, and a view of it.

Every field of TrainRequest is an option; nothing is written twice. Does not know: torch, how training works.
"""

from __future__ import annotations

import inspect
import json
import re
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import typer
from pydantic.fields import FieldInfo

from luthier.cli.output import (
    console,
    print_error,
    print_json,
    resolve_model,
    short,
    typed,
    visible,
)
from luthier.spec.data import Problem
from luthier.spec.errors import BadSetting, Broken, NotFound
from luthier.spec.job import TrainRequest, apply_recipe, make_request, validation_share
from luthier.spec.run import RunFolder

PANELS = {
    "What": ("model", "data", "objective", "validation", "template", "recipe", "continue_from"),
    "Preference": ("beta",),
    "Proof": ("proof_data", "metric", "proof_rows", "proof_examples", "proof_memory"),
    "Forgetting": ("forgetting", "keep_general", "replay", "replay_data"),
    "Gate": ("must_improve", "max_forgetting"),
    "Adapter": ("method", "rank", "alpha", "dropout", "target_modules"),
    "Rows": ("max_length", "overlong", "micro_tokens", "prompt_loss_weight"),
    "Run": ("seed", "precision", "checkpoint_every", "validate_every", "publish_checkpoints"),
    "Classification": ("classification_n_classes", "classification_positive_class", "classification_betas"),
}
REQUIRED = ("model", "data")
SEPARATED = {"target_modules", "classification_betas"}  # lists given as one text
# Options that --resume cannot change. What the others name is a file or a folder, and can be put right where it lies.
FIXED = frozenset(TrainRequest.model_fields) - {
    "model",
    "data",
    "replay_data",
    "validation",
    "proof_data",
    "template",
    "continue_from",
}


def train(**options: Any) -> None:
    """Fine-tune a model on your data.

    Options left at `auto` follow rules that docs/how-training-works.md prints. Ctrl-C stops at a checkpoint;
    `--resume` goes on as if nothing had happened. Exit codes: 0 done, 2 the request or the data is wrong, 75 right
    request at the wrong moment, 130 stopped by Ctrl-C, 1 anything else.
    """
    out, resume = options.pop("out"), options.pop("resume")
    as_json, processes = options.pop("as_json"), options.pop("processes")
    given = {name: value for name, value in options.items() if value not in (None, [])}
    if resume is not None:
        clash = [_flag(name) for name in given] + (["--out"] if out is not None else [])
        if clash:
            raise BadSetting(
                f"--resume goes on with a run as it was asked for, so {', '.join(clash)} cannot be given with it.",
                param="resume",
                hint="Leave them out, or start a new run.",
            )
        run, request = _reopen(resume)
    else:
        run, request = _new(given, out)
    raise typer.Exit(_carry_out(run, request, processes, as_json))


# -- options from the request's fields ---------------------------------------------------------------------------------


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _option(name: str, field: FieldInfo) -> inspect.Parameter:
    """The option of one field. All are texts here: make_request knows the types and names what is wrong."""
    panel = next((title for title, names in PANELS.items() if name in names), "Steps")
    words = field.description or ""
    if name in REQUIRED:
        words += " Required, unless --resume is given."
    default = field.get_default(call_default_factory=True)
    if not field.is_required() and default not in (None, [], False):
        words += f" Default: {default}."
    if name in SEPARATED:
        words += " Separated by commas."
    kind: Any = list[str] | None if name == "data" else bool | None if field.annotation is bool else str | None
    metavar = None if field.annotation is bool else _metavar(field)
    option = typer.Option(_flag(name), help=words, metavar=metavar, show_default=False, rich_help_panel=panel)
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind, option])


def _metavar(field: FieldInfo) -> str:
    """`N|auto` and the like, from the field's type."""
    words = list(dict.fromkeys(_type_words(field.annotation)))
    return "|".join(words)


def _type_words(kind: Any) -> Iterator[str]:
    origin = get_origin(kind)
    if origin is Literal:
        yield from map(str, get_args(kind))
    elif origin in (Union, UnionType, Annotated):
        for part in get_args(kind)[: 1 if origin is Annotated else None]:
            yield from _type_words(part)
    elif kind is not type(None):
        yield {int: "N", float: "X"}.get(kind, "TEXT")


def _own_options() -> list[inspect.Parameter]:
    """Options that are about this command, not about the training."""
    kinds: dict[str, tuple[Any, Any, Any]] = {
        "out": (
            str | None,
            None,
            typer.Option("--out", metavar="DIR", help="Run folder. Default: runs/MODEL-DATE-TIME."),
        ),
        "resume": (
            str | None,
            None,
            typer.Option("--resume", metavar="DIR", help="Go on with this run from its last checkpoint."),
        ),
        "processes": (
            int,
            1,
            typer.Option("--processes", metavar="N", min=1, help="Processes that share each step."),
        ),
        "as_json": (
            bool,
            False,
            typer.Option("--json", help="Print each event as a JSON line, and the outcome as the last."),
        ),
    }
    return parameters(kinds)


def parameters(kinds: dict[str, tuple[Any, Any, Any]]) -> list[inspect.Parameter]:
    """Options that are about a command: name -> (type, default, typer's option)."""
    made = []
    for name, (kind, default, option) in kinds.items():
        option.rich_help_panel = "This command"
        annotation: Any = Annotated[kind, option]
        made.append(inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation))
    return made


def request_options() -> list[inspect.Parameter]:
    """The options of a TrainRequest, for any command that takes one."""
    return [_option(name, field) for name, field in TrainRequest.model_fields.items()]


train.__signature__ = inspect.Signature([*request_options(), *_own_options()])  # type: ignore[attr-defined]


# -- request to run folder ---------------------------------------------------------------------------------------------


def _new(given: dict[str, Any], out: str | None) -> tuple[RunFolder, dict[str, Any]]:
    """A new run folder for the options given. Everything that can be refused without torch is refused before."""
    request, values = read_request(given)
    run = RunFolder(out or _default_out(request.model))
    run.refuse_taken()  # before a model is pulled for nothing
    values["model"] = model_reference(request.model, resolve_model(request.model))
    return run.create(values), values


def read_request(given: dict[str, Any]) -> tuple[TrainRequest, dict[str, Any]]:
    """What was asked by the options given, and the same as values to write down, files as absolute paths. Raises
    BadSetting, NotFound."""
    for name in SEPARATED & given.keys():
        given[name] = [part.strip() for part in given[name].split(",") if part.strip()]
    values = apply_recipe(given)
    for name in REQUIRED:
        if not values.get(name):
            raise BadSetting(f"{_flag(name)} is missing.", param=name, hint="See `luthier train --help`.")
    request = make_request(values)
    values = request.model_dump(mode="json", exclude_unset=True)
    return request, {**values, **_whole_paths(request)}


def _default_out(model: str) -> str:
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(model).name).strip("-.") or "model"
    return f"runs/{name}-{time.strftime('%Y%m%d-%H%M%S')}"


def _whole_paths(request: TrainRequest) -> dict[str, Any]:
    """The files of a request as absolute paths: a run may be resumed from another folder. Raises NotFound."""
    found: dict[str, Any] = {"data": [_file(path, "data") for path in request.data]}
    if request.validation is not None and validation_share(request.validation) is None:
        found["validation"] = _file(request.validation, "validation")
    for name in ("replay_data", "proof_data"):
        if (path := getattr(request, name)) is not None:
            found[name] = _file(path, name.replace("_", "-"))
    if request.continue_from is not None:
        found["continue_from"] = str(Path(request.continue_from).expanduser().absolute())
    if request.template is not None and Path(request.template).is_file():
        found["template"] = str(Path(request.template).absolute())
    return found


def _file(path: str, param: str) -> str:
    whole = Path(path).expanduser().absolute()
    if not whole.is_file():
        kind = "is a folder, not a file" if whole.is_dir() else "does not exist"
        raise NotFound(f"--{param}: {path} {kind}.", param=param, hint="Check the path.")
    return str(whole)


def model_reference(model: str, folder: Path) -> str:
    """A folder or file as an absolute path; a name stays a name."""
    local = Path(model).expanduser().absolute()
    return str(local) if local.is_file() or (local.exists() and folder == local) else model


def _reopen(path: str) -> tuple[RunFolder, dict[str, Any]]:
    run = RunFolder.open(path)
    with run.owned():  # raises NotNow while an engine works on it
        run.stop_note.unlink(missing_ok=True)
    try:
        request: dict[str, Any] = json.loads(run.request.read_text(encoding="utf-8"))
        model = str(request["model"])
    except (ValueError, KeyError, TypeError) as error:
        raise BadSetting(f"{run.request} is damaged: {error!r}.", hint="Start a new run.", param="resume") from error
    resolve_model(model)
    return run, request


# -- the run -----------------------------------------------------------------------------------------------------------


def _carry_out(run: RunFolder, request: dict[str, Any], processes: int, as_json: bool) -> int:
    from luthier.cli.follow import engine_command

    return show_run(run, request, engine_command(run, processes), as_json)


def show_run(run: RunFolder, request: dict[str, Any], command: Sequence[str], as_json: bool) -> int:
    """Start `command` on `run`, show it to its end, print what it came to. Returns the exit code."""
    from luthier.cli.follow import follow
    from luthier.cli.live import JsonView, LiveView, PlainView

    out = console()
    if as_json:
        view: JsonView | LiveView | PlainView = JsonView(request)
    elif sys.stdout.isatty() and not out.is_dumb_terminal:  # FORCE_COLOR makes no terminal of a pipe
        view = LiveView(out, request, short(run.path))
    else:
        view = PlainView(request, short(run.path))
    for _, event in run.events():
        view.account.see(event)
    with view:
        outcome = follow(run, command, view)
    event = outcome.event
    if as_json:
        print_json(_final(run, outcome.status, event))
    elif outcome.status == "succeeded":
        _print_summary(run, event)
    elif outcome.status == "stopped":
        after = f" after step {event['step']}" if event.get("step") is not None else ""
        out.print(f"Stopped{after}. Go on with:", soft_wrap=True)
        out.print(f"  {_resume(run)}", markup=False, soft_wrap=True)
    else:
        _print_failure(run, event, outcome.log_tail)
    return outcome.exit_code


def _final(run: RunFolder, status: str, event: dict[str, Any]) -> dict[str, Any]:
    """The last line of --json."""
    final = {"run": str(run.path), "status": status, "model": event.get("model"), "report": event.get("report")}
    if status == "stopped":
        final |= {"step": event.get("step"), "resume": event.get("resume")}
    if status == "failed":
        final |= {name: event.get(name) for name in ("code", "message", "hint", "param")}
        final["problems"] = event.get("problems") or []
    return final


def _resume(run: RunFolder) -> str:
    return typed("luthier", "train", "--resume", short(run.path))


def _print_failure(run: RunFolder, event: dict[str, Any], log_tail: Sequence[str]) -> None:
    if log_tail:
        err = console(stderr=True)
        err.print("The engine's last words:", style="dim")
        for line in log_tail:
            err.print("  " + visible(line), style="dim", markup=False, soft_wrap=True)
    problems = [Problem(**problem) for problem in event.get("problems") or []]
    hint = str(event.get("hint") or "")
    if event.get("param") in FIXED:
        hint += f"{' ' if hint else ''}A run keeps the options it was started with: start another, with another --out."
    elif _resume(run) not in hint:
        ours = event.get("code") == Broken.code
        hint += f"{' ' if hint else ''}{'To try again' if ours else 'Once that is put right'}: {_resume(run)}"
    print_error(str(event.get("message")), hint, problems)


def _print_summary(run: RunFolder, event: dict[str, Any]) -> None:
    from rich.panel import Panel
    from rich.table import Table
    from rich.text import Text

    from luthier.cli.live import summary

    lines = summary(event["report"], event["model"])
    path = short(run.path)
    lines += [
        ("talk to it", typed("luthier", "chat", path)),
        ("measure it", f"{typed('luthier', 'evaluate', path)} --data FILE"),
    ]
    if event["report"].get("proof"):
        lines.append(("report", f"{typed('luthier', 'report', path)}, or {short(run.page)}"))
    out = console()
    if event["report"].get("proof"):
        from luthier.cli.proof import show_proof
        from luthier.cli.report import read_report

        proof = read_report(run).proof  # with its rows, which the event leaves out
        if proof is not None:
            show_proof(proof)
    if not sys.stdout.isatty():
        for label, value in lines:
            print(f"{label + ':':17}{visible(value)}")
        return
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for label, value in lines:
        table.add_row(label, Text(visible(value)))
    out.print(Panel(table, title="Done", title_align="left", border_style="green", expand=False))
