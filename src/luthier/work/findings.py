"""The data doctor's look at a job's files, told as events: each finding with its count, rows and the next step.

A job does not wait for it: what is found within seconds comes before the job queues, what takes longer comes beside it,
as long as the job is not over.
Does not know: what is looked for (data/checkup.py starts it), when a job's files are good (validate.py).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from luthier.data import checkup
from luthier.store.files import Files
from luthier.store.history import EventDraft
from luthier.store.jobs import Job
from luthier.work.launch import Child

SECONDS = 8.0  # that a job waits for its findings
MOST_LATE = 2  # jobs that are looked at beside their training
MOST_TOLD = 8  # findings with an event of their own
LONGEST = 480  # characters of a message
PLACE = 0  # of these events: before everything in the run's events.jsonl
SHOWN_ROWS = 5


class Look:
    """One job's files being looked at by a process. `report` is there when `done` says so, unless that failed."""

    def __init__(self, job: Job, files: Files, environment: Mapping[str, str]) -> None:
        """Start it. Raises NotFound for a file that was deleted, OSError."""
        self.job = job
        self.report: dict[str, Any] | None = None
        self.failed = False
        self._child: Child | None = None
        training = files.get(job.training_file)
        validation = None if job.validation_file is None else files.get(job.validation_file)
        self.names = {checkup.checked_name(training.filename): job.training_file}
        checks, name = files.checks, checkup.checked_name(training.filename)
        kept = checks.read(training.sha256, name) if validation is None else None
        if kept is not None:
            self.report = json.loads(kept)
            return
        self._folder = TemporaryDirectory(prefix="luthier-check-")
        held = [] if validation is None else [(files.blobs.path(validation.sha256), "validation.jsonl")]
        place = Path(self._folder.name)
        self._out = checks.path(training.sha256, name) if validation is None else place / "report.json"
        (place / "work").mkdir()
        asked = checkup.asking([(files.blobs.path(training.sha256), name)], self._out, place / "work", held)
        self._child = Child(checkup.command(), log=place / "log", environment=environment, input=asked)

    def done(self) -> bool:
        """Whether the look is over; takes in the report then."""
        if self._child is None:
            return True
        code = self._child.poll()
        if code is None:
            return False
        if code == 0:
            self.report = json.loads(self._out.read_text("utf-8"))
        self.failed = code != 0
        self.end()
        return True

    def end(self) -> None:
        """End the process, if it still runs, and leave nothing of it."""
        if self._child is not None:
            self._child.end(0)
            self._child = None
            self._folder.cleanup()

    def events(self) -> list[EventDraft]:
        """What is to be told; nothing when nothing was found."""
        if self.report is not None:
            return told(self.report["findings"], self.names, self.job)
        what = f"The files were not searched for repeats, leaks and the like: that took more than {checkup.LIMITS}."
        return [EventDraft(what, PLACE, 1)]


def told(findings: Sequence[Mapping[str, Any]], names: Mapping[str, str], job: Job) -> list[EventDraft]:
    """The worst findings as events of their own, the rest and mere notes together in one.

    That a file holds pairs of answers is no news to a job that asked for them.
    """
    if job.method == "dpo":
        findings = [found for found in findings if found["kind"] != "pairs"]
    important = [found for found in findings if found["severity"] != "note"]
    drafts = [
        EventDraft(_sentence(found, _which(found, names)), PLACE, part, "warn", data=_data(found, names, job))
        for part, found in enumerate(important[:MOST_TOLD], 1)
    ]
    rest = [*important[MOST_TOLD:], *(found for found in findings if found["severity"] == "note")]
    if rest:
        said = "; ".join(f"{_which(found, names)} file: {found['message']}" for found in rest)
        kinds = {"findings": [{"kind": found["kind"], "count": found["count"]} for found in rest]}
        drafts.append(EventDraft(_cut(f"Also worth a look: {said}."), PLACE, len(drafts) + 1, data=kinds))
    return drafts


def _which(found: Mapping[str, Any], names: Mapping[str, str]) -> str:
    return "Training" if found["file"] in names else "Validation"


def _sentence(found: Mapping[str, Any], which: str) -> str:
    rows = ", ".join(map(str, found["rows"][:SHOWN_ROWS]))
    more = ", ..." if found["count"] > SHOWN_ROWS else ""
    where = f" ({'row' if len(found['rows']) == 1 else 'rows'} {rows}{more})" if rows else ""
    first = f" The first: {found['details'][0]}." if found["details"] else ""
    return _cut(f"{which} file: {found['message']}{where}. {found['why']}{first}")


def _cut(text: str) -> str:
    return text if len(text) <= LONGEST else text[: LONGEST - 3] + "..."


def _data(found: Mapping[str, Any], names: Mapping[str, str], job: Job) -> dict[str, Any]:
    kept = {name: found[name] for name in ("kind", "severity", "count", "rows")}
    return {**kept, "file_id": names.get(found["file"], job.validation_file), "fix": found["fix"]}
