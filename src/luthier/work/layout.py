"""A job as a run folder: home/runs/JOB with the data beside request.json, the same wherever the job is worked on.

request.json appears last, so a folder that has one is whole, and another worker goes on from its checkpoints.
Does not know: how a run is started; what its events say.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

from luthier.spec.bases import Bases
from luthier.spec.errors import LuthierError, NotFound, UserError
from luthier.spec.job import make_request
from luthier.spec.run import RunFolder, write_json
from luthier.store.db import Database
from luthier.store.files import Files
from luthier.store.jobs import Job
from luthier.store.models import Models

KEPT_CHECKPOINTS = 3  # as OpenAI keeps them
NAMES = {  # a job's hyperparameter -> the engine's option
    "n_epochs": "epochs",
    "batch_size": "batch_size",
    "learning_rate_multiplier": "learning_rate_multiplier",
    "prompt_loss_weight": "prompt_loss_weight",
    "replay": "replay",
    "beta": "beta",
}
LEGACY_MULTIPLIER = 0.1  # the older API's usual value: it means this server's own rate
CLASSIFICATION = ("classification_n_classes", "classification_positive_class", "classification_betas")
PROOF = ("metric", "proof_rows", "forgetting", "keep_general", "must_improve", "max_forgetting")
PLACES = ("model", "data", "validation", "continue_from")  # fields of a request that name files
PARAMS = {  # the engine's word for what was wrong -> the job's
    "data": "training_file",
    "validation": "validation_file",
    "model": "model",
    "continue_from": "model",
    "epochs": "n_epochs",
    "batch_size": "batch_size",
    "learning_rate": "learning_rate_multiplier",
    "learning_rate_multiplier": "learning_rate_multiplier",
    "prompt_loss_weight": "prompt_loss_weight",
    "replay": "replay",
    "beta": "beta",
    "objective": "method",
    **{name: name for name in (*CLASSIFICATION, *PROOF)},
}


class FileGone(UserError):
    """A file that was there when the job was made has been deleted."""

    def __init__(self, which: str, file_id: str) -> None:
        super().__init__(f"The {which} file {file_id} has been deleted.", param=f"{which}_file")
        self.code = f"invalid_{which}_file"


def run_folder(database: Database, job_id: str) -> RunFolder:
    """The one place of a job's run. Raises UserError when it would lie outside home."""
    return RunFolder(database.home / database.inside(Path("runs") / job_id))


def lay_out(database: Database, bases: Bases, job: Job) -> RunFolder:
    """The run folder of `job`, made unless there is one already; then its paths become those of this machine.

    Raises FileGone, NotFound for a base or parent that is no longer offered, BadSetting, OSError.
    """
    run = run_folder(database, job.id)
    if run.request.is_file():
        with contextlib.suppress(NotFound):  # no longer offered, which is no matter to a run that has begun
            _bring_here(run, _request(database, bases, job, run))
        return run
    request = _request(database, bases, job, run)
    values = make_request(request).model_dump(mode="json", exclude_unset=True)
    try:
        (run.path / "data").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LuthierError(f"The run folder cannot be made: {error.strerror}.") from error
    files = Files(database)
    for which, file_id in (("training", job.training_file), ("validation", job.validation_file)):
        if file_id is not None:
            _bring(blob_of(files, which, file_id), data_file(run, which))
    return run.create(values)


def _bring_here(run: RunFolder, values: dict[str, Any]) -> None:
    """Let a run that another machine began name its files as this one mounts them; nothing else of it changes."""
    try:
        known = json.loads(run.request.read_text(encoding="utf-8"))
    except ValueError:
        return  # the engine tells that it is damaged
    here = {**known, **{name: values[name] for name in PLACES if name in values}}
    if here != known:
        write_json(run.request, here)


def data_file(run: RunFolder, which: str) -> Path:
    return run.path / "data" / f"{which}.jsonl"


def blob_of(files: Files, which: str, file_id: str) -> Path:
    """Where the content lies. Raises FileGone."""
    try:
        return files.blobs.path(files.get(file_id).sha256)
    except NotFound as error:
        raise FileGone(which, file_id) from error


def _bring(blob: Path, place: Path) -> None:
    """A second name for the same bytes, which never change; a copy where the file system has no such thing."""
    place.unlink(missing_ok=True)
    try:
        os.link(blob, place)
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.EPERM, errno.ENOTSUP, errno.EMLINK):
            raise
        with contextlib.ExitStack() as undo:
            undo.callback(place.unlink, missing_ok=True)
            shutil.copyfile(blob, place)
            undo.pop_all()


def _request(database: Database, bases: Bases, job: Job, run: RunFolder) -> dict[str, Any]:
    asked, base = job.request, job.request["base"]
    if base not in bases.sources:
        raise NotFound(f"The base model {base} is not offered here.", param="model")
    values: dict[str, Any] = {
        "model": bases.sources[base],
        "data": [str(data_file(run, "training"))],
        "seed": job.seed,
        "template": "auto",  # nobody can be asked for another when the base's own has no place for tools
        "overlong": "truncate",  # as OpenAI does; a warning says how much was lost
        "publish_checkpoints": KEPT_CHECKPOINTS,
        "proof_memory": "run",  # what the client deletes shall be gone
    }
    if job.method != "supervised":
        values["objective"] = job.method
    if job.validation_file is not None:
        values["validation"] = str(data_file(run, "validation"))
    values |= {name: asked[name] for name in PROOF if asked.get(name) is not None}
    if asked.get("parent") is not None:
        values["continue_from"] = str(Models(database).get(asked["parent"]).folder)
    given = asked.get("hyperparameters") or {}
    values |= {ours: given[name] for name, ours in NAMES.items() if given.get(name) not in (None, "auto")}
    if job.kind == "legacy" and "learning_rate_multiplier" in values:
        values["learning_rate_multiplier"] /= LEGACY_MULTIPLIER
    if given.get("compute_classification_metrics"):
        values |= {name: given[name] for name in CLASSIFICATION if given.get(name) is not None}
    return values


def resolved(job: Job, settings: dict[str, Any]) -> dict[str, Any]:
    """What the hyperparameters came to: numbers in place of `auto`; `settings` are those of the `prepared` event."""
    given = {name: value for name, value in (job.request.get("hyperparameters") or {}).items() if value is not None}
    multiplier = given.get("learning_rate_multiplier", "auto")
    return {
        **given,
        **({"beta": settings["beta"]} if job.method == "dpo" else {}),
        "n_epochs": settings["epochs"],
        "batch_size": settings["batch_size"],
        "learning_rate_multiplier": 1.0 if multiplier == "auto" else float(multiplier),
    }
