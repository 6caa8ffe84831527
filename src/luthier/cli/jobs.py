"""`luthier jobs`: fine-tuning jobs of a server.

Does not know: how a job is followed (watching.py), HTTP.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from luthier.cli.client import Server, connect, segment
from luthier.cli.keys import when
from luthier.cli.output import number, print_json, visible
from luthier.spec.errors import BadSetting

if TYPE_CHECKING:
    from luthier.cli.client import Client

app = typer.Typer(
    help="Fine-tuning jobs of a server: ask for one, follow it, pause, resume, cancel.", no_args_is_help=True
)

PATH = "/fine_tuning/jobs"
AsJson = Annotated[bool, typer.Option("--json", help="Print the server's JSON.")]
Id = Annotated[str, typer.Argument(metavar="ID", help="The job's id (ftjob-...).")]
Limit = Annotated[int | None, typer.Option("--limit", min=1, help="At most so many, the newest.")]


@app.callback()
def jobs() -> None:
    """Fine-tuning jobs of a server: ask for one, follow it, pause, resume, cancel."""


@app.command()
def create(
    model: Annotated[str, typer.Option("--model", help="A base or a tuned model of the server.")],
    training_file: Annotated[str, typer.Option("--training-file", "-t", help="A file id, or a file to send first.")],
    validation_file: Annotated[
        str | None, typer.Option("--validation-file", "-v", help="The same, with rows to measure on.")
    ] = None,
    suffix: Annotated[str | None, typer.Option("--suffix", help="A part of the tuned model's name.")] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="The same seed gives the same model.")] = None,
    epochs: Annotated[str, typer.Option("--epochs", metavar="N|auto", help="Passes over the data.")] = "auto",
    batch_size: Annotated[str, typer.Option("--batch-size", metavar="N|auto", help="Rows a step.")] = "auto",
    multiplier: Annotated[
        str, typer.Option("--learning-rate-multiplier", metavar="X|auto", help="Times the server's own rate.")
    ] = "auto",
    method: Annotated[
        Literal["supervised", "dpo"], typer.Option("--method", help="dpo: learn from pairs of answers, one preferred.")
    ] = "supervised",
    beta: Annotated[
        str | None,
        typer.Option("--beta", metavar="X|auto", help="dpo: how close to stay to the start, to 2; auto is 0.1."),
    ] = None,
    replay: Annotated[
        float | None, typer.Option("--replay", metavar="R", help="General rows mixed in, as a share of the data (0.1).")
    ] = None,
    metric: Annotated[str | None, typer.Option("--metric", help="How the validation answers are scored.")] = None,
    proof_rows: Annotated[
        str, typer.Option("--proof-rows", metavar="N|auto", help="Validation rows that prove it; 0: no proof.")
    ] = "auto",
    forgetting: Annotated[
        str, typer.Option("--forgetting", metavar="N|auto|off", help="General items asked before and after.")
    ] = "auto",
    keep_general: Annotated[
        bool, typer.Option("--keep-general", help="Publish at the scale that best keeps general ability.")
    ] = False,
    must_improve: Annotated[
        float | None, typer.Option("--must-improve", metavar="X", help="Gate: the improvement that must be shown.")
    ] = None,
    max_forgetting: Annotated[
        float | None, typer.Option("--max-forgetting", metavar="X", help="Gate: the most ability that may be lost.")
    ] = None,
    metadata: Annotated[
        list[str] | None, typer.Option("--metadata", metavar="KEY=VALUE", help="Kept with the job.")
    ] = None,
    follow_it: Annotated[bool, typer.Option("--follow", help="Stay until it ends, as `jobs follow` does.")] = False,
    server: Server = None,
    as_json: AsJson = False,
) -> None:
    """Start a fine-tuning job and print its id."""
    body: dict[str, Any] = {"model": model, "suffix": suffix, "seed": seed}
    hyperparameters = {
        "n_epochs": _number(epochs, int, "--epochs"),
        "batch_size": _number(batch_size, int, "--batch-size"),
        "learning_rate_multiplier": _number(multiplier, float, "--learning-rate-multiplier"),
    }
    hyperparameters |= _of_the_method(method, beta, replay)
    body |= {"metric": metric, "must_improve": must_improve, "max_forgetting": max_forgetting}
    body["keep_general"] = keep_general or None
    body["proof_rows"] = _number(proof_rows, int, "--proof-rows")
    body["forgetting"] = forgetting if forgetting == "off" else _number(forgetting, int, "--forgetting")
    body["method"] = {"type": method, method: {"hyperparameters": hyperparameters}}
    body["metadata"] = _pairs(metadata) or None
    client = connect(server)
    client.get(f"/models/{segment(model)}")  # before files are sent for nothing
    body["training_file"] = _file_id(client, training_file)
    body["validation_file"] = _file_id(client, validation_file) if validation_file else None
    job = client.post(PATH, {name: value for name, value in body.items() if value is not None})
    if as_json:
        print_json(job)
    else:
        print(job["id"], flush=True)
    if follow_it:
        _follow(client, job["id"], None, as_json, server)


@app.command("list")
def list_jobs(limit: Limit = 20, server: Server = None, as_json: AsJson = False) -> None:
    """Show the jobs, the newest first."""
    for job in connect(server).pages(PATH, limit):
        if as_json:
            print_json(job)
        else:
            print(_line(job))


@app.command()
def get(job_id: Id, server: Server = None, as_json: AsJson = False) -> None:
    """Show a job."""
    _show(connect(server).get(_path(job_id)), as_json)


@app.command()
def cancel(job_id: Id, server: Server = None, as_json: AsJson = False) -> None:
    """End a job. What it has trained so far stays only as checkpoints."""
    _show(connect(server).post(_path(job_id, "cancel")), as_json)


@app.command()
def pause(job_id: Id, server: Server = None, as_json: AsJson = False) -> None:
    """Save a running job at a checkpoint and let the next one have the worker."""
    _show(connect(server).post(_path(job_id, "pause")), as_json)


@app.command()
def resume(job_id: Id, server: Server = None, as_json: AsJson = False) -> None:
    """Go on with a paused job."""
    _show(connect(server).post(_path(job_id, "resume")), as_json)


@app.command()
def events(job_id: Id, limit: Limit = None, server: Server = None, as_json: AsJson = False) -> None:
    """Show what has happened to a job, in order of time."""
    found = list(connect(server).pages(_path(job_id, "events"), limit))
    for event in reversed(found):
        if as_json:
            print_json(event)
        else:
            print(visible(f"{when(event['created_at'])}  {event['message']}"))


@app.command()
def checkpoints(job_id: Id, limit: Limit = None, server: Server = None, as_json: AsJson = False) -> None:
    """Show a job's checkpoints, the newest first. Each is a model that can be used."""
    from luthier.cli.watching import reward_words

    for checkpoint in connect(server).pages(_path(job_id, "checkpoints"), limit):
        if as_json:
            print_json(checkpoint)
            continue
        metrics = checkpoint.get("metrics") or {}
        loss = metrics.get("full_valid_loss", metrics.get("valid_loss"))
        words = f"step {checkpoint['step_number']:>6}  training loss {_decimal(metrics.get('train_loss'))}"
        words += f"  validation loss {_decimal(loss)}"
        words += reward_words(metrics, "  ")
        print(visible(f"{words}  {checkpoint['fine_tuned_model_checkpoint']}"))


@app.command()
def follow(
    job_id: Id,
    after: Annotated[
        str | None, typer.Option("--after", metavar="EVENT", help="Leave out events up to this one (ftevent-...).")
    ] = None,
    server: Server = None,
    as_json: AsJson = False,
) -> None:
    """Watch a job until it ends: a loss curve on a terminal, lines elsewhere, events with --json.

    Starts with the job's history, and waits for a server that restarts. Ctrl-C leaves the job running. Exit code 0
    when the job succeeded, 75 when it was cancelled or paused.
    """
    _follow(connect(server), job_id, after, as_json, server)


def _follow(client: Client, job_id: str, after: str | None, as_json: bool, server: str | None) -> None:
    from luthier.cli.watching import watch

    code = watch(client, _path(job_id), after, as_json, server)
    if code:
        raise typer.Exit(code)


def _path(job_id: str, *rest: str) -> str:
    return "/".join([PATH, segment(job_id), *rest])


def _file_id(client: Client, word: str) -> str:
    """An id as it is; a file of this machine is sent first."""
    if word.startswith("file-") and not Path(word).is_file():
        return word
    made = client.upload(Path(word), "fine-tune")
    print(visible(f"Sent {word}: {made['id']}"), file=sys.stderr)
    return str(made["id"])


def _number(word: str, kind: type[int] | type[float], option: str) -> int | float | str:
    if word == "auto":
        return word
    try:
        return kind(word)
    except ValueError as error:
        wanted = "a whole number" if kind is int else "a number"
        raise BadSetting(f"{option}: found {word!r}, wanted {wanted} or auto.", param=option[2:]) from error


def _of_the_method(method: str, beta: str | None, replay: float | None) -> dict[str, Any]:
    """The hyperparameters that only one method has. Raises BadSetting."""
    for option, value, owner in (("--beta", beta, "dpo"), ("--replay", replay, "supervised")):
        if value is not None and method != owner:
            raise BadSetting(f"{option} is for --method {owner}, not {method}.", param=option[2:])
    values = {"beta": None if beta is None else _number(beta, float, "--beta"), "replay": replay}
    return {name: value for name, value in values.items() if value is not None}


def _pairs(words: list[str] | None) -> dict[str, str]:
    pairs = {}
    for word in words or ():
        key, mark, value = word.partition("=")
        if not (key and mark):
            raise BadSetting(f"--metadata: found {word!r}, wanted KEY=VALUE.", param="metadata")
        pairs[key] = value
    return pairs


def _show(job: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print_json(job)
        return
    print(_line(job))
    error = job.get("error") or {}
    method = job.get("method") or {}
    numbers = (method.get(method.get("type")) or {}).get("hyperparameters") or {}
    facts = {
        "base": job.get("model"),
        "method": method.get("type"),
        "training file": job.get("training_file"),
        "validation file": job.get("validation_file"),
        "result files": ", ".join(job.get("result_files") or ()),
        "trained tokens": job.get("trained_tokens"),
        "finished": when(job["finished_at"]) if job.get("finished_at") else None,
        "proof": (job.get("proof") or {}).get("sentence"),
        "forgetting": _forgotten(job.get("forgetting")),
        "gate": _gate(job.get("gate")),
        "error": error.get("message"),
        **{name: value for name, value in numbers.items() if not isinstance(value, dict)},
    }
    for name, value in facts.items():
        if value not in (None, ""):
            print(visible(f"  {name}: {value}"))


def _forgotten(found: dict[str, Any] | None) -> str | None:
    if not found or found.get("loss") is None:
        return None
    return f"lost {found['loss']:+.1%} of general ability, 95% interval {found['low']:+.1%} to {found['high']:+.1%}"


def _gate(found: dict[str, Any] | None) -> str | None:
    if not found:
        return None
    return "passed" if found["passed"] else " ".join(["closed:", *found["reasons"]])


def _line(job: dict[str, Any]) -> str:
    facts = (job["id"], when(job["created_at"]), f"{job['status']:<16}", job.get("fine_tuned_model") or job["model"])
    return visible("  ".join(map(str, facts)))


def _decimal(value: Any) -> str:
    return number(value, ".4f")
