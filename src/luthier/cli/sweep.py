"""`luthier sweep`: a small grid of settings, tried by successive halving, and the command that trains the winner again.

Takes the options of `luthier train`; some of them several values. Does not know: torch; how trials are carried out
(sweeping.py).
"""

from __future__ import annotations

import inspect
import secrets
import time
from typing import TYPE_CHECKING, Any

import typer

from luthier.cli.output import console, print_json, resolve_model, short, typed
from luthier.spec.errors import BadSetting, NotNow
from luthier.spec.sweep import GRID, Asked, By, Result, combinations, read_grid

if TYPE_CHECKING:
    from luthier.cli.sweeping import Folder

OWN = ("out", "resume", "halving", "by", "processes", "as_json")


def sweep(**options: Any) -> None:
    """Try several settings, leave the worse ones early, prove the best one.

    Takes the options of `luthier train`. Learning rate, its multiplier, rank, epochs, batch size and beta may have
    several values, separated by commas; with none, the automatic learning rate is tried at 0.3, 1 and 3 times. The rows
    that decide are not the rows that prove. The same command again, or `--resume`, goes on where a sweep was stopped or
    killed. Exit codes: as `luthier train`; 1 or 2 only when no trial is left.
    """
    from luthier.cli.sweep_view import show, watcher
    from luthier.cli.sweeping import Folder, Interrupted, Sweep, failure_words

    own = {name: options.pop(name) for name in OWN}
    given = {name: value for name, value in options.items() if value not in (None, [])}
    if own["resume"] is not None and (given or own["out"] is not None):
        raise BadSetting(
            "--resume goes on with a sweep as it was asked for: no other options can be given with it.",
            param="resume",
            hint="Leave them out, or start a new sweep.",
        )
    folder = Folder(own["resume"] or own["out"] or f"runs/sweep-{time.strftime('%Y%m%d-%H%M%S')}")
    if own["resume"] is not None and not folder.asked.is_file():
        raise BadSetting(f"--resume: {short(folder.path)} holds no sweep.", param="resume", hint="Check the path.")
    with folder.owned():
        asked = _asked(folder, given, own)
        view = watcher(own["as_json"])
        try:
            with view:
                result = Sweep(folder, asked, view, own["processes"]).go()
        except Interrupted:
            console(stderr=True).print(f"Stopped. Go on with: {_again(folder)}", markup=False, soft_wrap=True)
            raise typer.Exit(130) from None
        except NotNow as error:
            error.hint = f"{error.hint or ''} Then: {_again(folder)}".strip()
            raise
    if result.status == "failed":
        raise failure_words(result)
    if own["as_json"]:
        print_json(_told(folder, result))
    else:
        show(folder, result)


def _again(folder: Folder) -> str:
    return typed("luthier", "sweep", "--resume", short(folder.path))


def _told(folder: Folder, result: Result) -> dict[str, Any]:
    return {"sweep": str(folder.path), **result.model_dump(exclude={"proof": {"rows"}})}


def _asked(folder: Folder, given: dict[str, Any], own: dict[str, Any]) -> Asked:
    """What an earlier attempt was asked, or a new sweep, written down. Raises NotNow for a folder with another one."""
    from luthier.cli.sweeping import hashes, keep_apart, refuse_changed

    options = {**given, "halving": own["halving"], "by": own["by"]}
    known = folder.read()
    if known is not None:
        if own["resume"] is None and known.given != options:
            raise NotNow(
                f"{short(folder.path)} already holds another sweep.",
                hint=f"Go on with it ({_again(folder)}) or name another --out.",
                param="out",
            )
        refuse_changed(known)
        return known
    from luthier.cli.train import model_reference, read_request

    shared, grid = read_grid(dict(given))
    request, values = read_request(shared)
    if own["by"] == "metric" and request.proof_rows == 0:
        raise BadSetting("--by metric asks the model for answers, and --proof-rows 0 for none.", param="by")
    if own["by"] == "loss" and "beta" in grid:
        raise BadSetting(
            "Losses of different betas measure different things, so they decide nothing.",
            hint="Decide by which answer is likelier: --by metric.",
            param="by",
        )
    combinations(values, grid)
    values["model"] = model_reference(request.model, resolve_model(request.model))
    seed = values.setdefault("seed", secrets.randbelow(2**31))
    if own["by"] == "metric":
        values.setdefault("publish_checkpoints", 1)  # what is left at a rung is asked as a model of its own
    values, apart = keep_apart(values, folder, seed)
    asked = Asked(
        request=values,
        grid=grid,
        halving=own["halving"],
        by=own["by"],
        given=options,
        files=hashes(values),
        kept_apart=apart,
    )
    from luthier.spec.run import write_json

    write_json(folder.asked, asked.model_dump())
    return asked


# -- options -----------------------------------------------------------------------------------------------------------


def _own_options() -> list[inspect.Parameter]:
    from luthier.cli.train import parameters

    kinds: dict[str, tuple[Any, Any, Any]] = {
        "out": (
            str | None,
            None,
            typer.Option("--out", metavar="DIR", help="The sweep's folder. Default: runs/sweep-DATE-TIME."),
        ),
        "resume": (str | None, None, typer.Option("--resume", metavar="DIR", help="Go on with this sweep.")),
        "halving": (
            int,
            3,
            typer.Option(
                "--halving",
                metavar="N",
                min=1,
                help="One trial in N goes on from each rung, to N times the steps; 1: every trial goes to its end.",
            ),
        ),
        "by": (
            By,
            "loss",
            typer.Option("--by", help="What decides, on the deciding rows: their loss, or the proof's metric."),
        ),
        "processes": (
            int,
            1,
            typer.Option("--processes", metavar="N", min=1, help="Processes that share each step of a trial."),
        ),
        "as_json": (bool, False, typer.Option("--json", help="Print what came of it as one JSON object.")),
    }
    return parameters(kinds)


def _sign() -> None:
    from luthier.cli.train import request_options

    options = request_options()
    for option in options:
        if option.name in GRID:
            option.annotation.__metadata__[0].help += " Several values: separated by commas."
    sweep.__signature__ = inspect.Signature([*options, *_own_options()])  # type: ignore[attr-defined]


_sign()
