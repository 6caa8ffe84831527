"""`luthier`: the commands, and the one place where errors become words, JSON and exit codes.

Every command imports the room it needs when it runs, so that `luthier --help` answers at once.
"""

from __future__ import annotations

import errno
import sys
import traceback
from collections.abc import Sequence
from types import TracebackType
from typing import Annotated

import typer
import typer.main

from luthier import __version__
from luthier.cli import data, files, jobs, keys, models
from luthier.cli.chat import chat
from luthier.cli.check import check
from luthier.cli.convert import convert
from luthier.cli.estimate import estimate
from luthier.cli.evaluate import evaluate
from luthier.cli.fix import fix
from luthier.cli.forgetting import forgetting
from luthier.cli.keep import keep_general
from luthier.cli.mix import mix
from luthier.cli.output import error_object, print_error, print_json, tolerate_narrow_encodings
from luthier.cli.prepare import prepare
from luthier.cli.report import report
from luthier.cli.serve import serve, worker
from luthier.cli.split import split
from luthier.cli.sweep import sweep
from luthier.cli.train import train
from luthier.spec.errors import BadData, Broken, LuthierError, UserError

# What the system says of a path that somebody typed and nobody can use; whichever room meets it first.
UNUSABLE = frozenset({errno.ENAMETOOLONG, errno.EACCES, errno.EPERM, errno.ELOOP, errno.ENOTDIR, errno.EISDIR})

app = typer.Typer(
    name="luthier",
    help="Turns a general open-weight language model into a precise tool for one job, and proves it did.",
    rich_markup_mode="markdown",
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command()(train)
app.command()(sweep)
app.command()(estimate)
app.command()(chat)
app.command()(evaluate)
app.command()(report)
app.command()(forgetting)
app.command("keep-general")(keep_general)
app.command()(data.tokenize)
data.app.command("check")(check)
data.app.command("fix")(fix)
data.app.command("prepare")(prepare)
data.app.command("mix")(mix)
data.app.command("split")(split)
data.app.command("convert")(convert)
app.add_typer(data.app, name="data")
app.add_typer(models.app, name="models")
app.command()(serve)
app.command()(worker)
app.add_typer(keys.app, name="keys")
app.add_typer(files.app, name="files")
app.add_typer(jobs.app, name="jobs")


def _say_version(asked: bool) -> None:
    if asked:
        print(f"luthier {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def luthier(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", help="Show the version.", callback=_say_version, is_eager=True)
    ] = False,
) -> None:
    """Turns a general open-weight language model into a precise tool for one job, and proves it did."""
    if context.invoked_subcommand is None:
        print(context.get_help())


def main(arguments: Sequence[str] | None = None) -> None:
    """The console script. Always leaves through SystemExit; see spec/errors.py for the codes."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    tolerate_narrow_encodings()
    sys.excepthook = _unexpected
    as_json = "--json" in words
    try:
        command = typer.main.get_command(app)  # calling `app` itself would put Typer's own hook over ours
        sys.exit(command.main(words, prog_name="luthier", standalone_mode=False))
    except LuthierError as error:
        sys.exit(_told(error, as_json))
    except typer.TyperException as error:
        sys.exit(_misused(error, as_json))
    except OSError as error:
        if error.errno not in UNUSABLE or error.filename is None:
            raise
        told = UserError(
            f"{error.filename} cannot be used: {error.strerror}.", hint="Check the path and who may use it."
        )
        sys.exit(_told(told, as_json))
    except (typer.Abort, KeyboardInterrupt):
        sys.exit(130)


def _told(error: LuthierError, as_json: bool) -> int:
    if isinstance(error, Broken) and error.__cause__ is not None:
        traceback.print_exception(error)
    if as_json:
        print_json(error_object(error))
    else:
        print_error(error.message, error.hint, error.problems if isinstance(error, BadData) else None)
    return error.exit_code


def _misused(error: typer.TyperException, as_json: bool) -> int:
    """Options and arguments that Typer itself refuses."""
    context = getattr(error, "ctx", None)
    if type(error).__name__ == "NoArgsIsHelpError":  # the help has been printed already
        return UserError.exit_code
    where = context.command_path if context is not None else "luthier"
    return _told(UserError(error.format_message(), hint=f"See `{where} --help`."), as_json)


def _unexpected(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """An exception that nobody meant: everything that helps to find it, then a sentence."""
    if issubclass(kind, KeyboardInterrupt):
        return
    traceback.print_exception(kind, error, trace)
    told = Broken(
        f"Luthier met an error that it did not expect: {kind.__name__}: {error}",
        hint="The lines above say where; please report them.",
    )
    _told(told, "--json" in sys.argv)
