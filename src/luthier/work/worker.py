"""A worker: claims jobs, checks their files, has the engine carry them out, writes down what came of it.

Two threads claim: one checks files, which takes seconds and must not wait behind a training run of hours, and takes
jobs from dead workers' hands; the other (the caller's) runs one job at a time. Whatever a job does, the worker goes on
to the next; whatever becomes of the worker, its lease ends and the next one goes on from the last checkpoint.
Does not know: what an engine's events mean (record.py), how a run is watched (attempt.py).
"""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from luthier.settings import Settings, child_environment
from luthier.spec.bases import Bases
from luthier.spec.errors import LuthierError, NotFound, NotNow
from luthier.spec.run import RunFolder, write_json
from luthier.store.aliases import Aliases, Verdict
from luthier.store.db import Database
from luthier.store.files import Files
from luthier.store.jobs import TERMINAL, Job, Jobs
from luthier.store.leases import Lease, LeaseLost, Leases, Stage
from luthier.work import findings
from luthier.work.attempt import Attempt, Fate
from luthier.work.findings import Look
from luthier.work.hold import Hold
from luthier.work.launch import Child
from luthier.work.layout import FileGone, blob_of, lay_out
from luthier.work.record import Recorder, unregister
from luthier.work.results import FILENAMES, REPORTS, result_table
from luthier.work.validate import Refusal, unread, verdict_of

logger = logging.getLogger("luthier.work")

IDLE = 0.5  # seconds between two looks for work
LEASE = 10.0  # seconds that a job stays a silent worker's
BEAT = 1.0  # seconds between two beats
PATIENCE = 0.1  # seconds between two looks at a child

EngineCommand = Callable[[RunFolder], Sequence[str]]


def engine_command(run: RunFolder) -> list[str]:
    return [sys.executable, "-m", "luthier.engine", str(run.path)]


class Worker:
    """One worker of a database. `command` makes the command line that carries out a run folder."""

    def __init__(
        self,
        settings: Settings,
        database: Database,
        bases: Bases,
        name: str,
        *,
        command: EngineCommand = engine_command,
        lease: float = LEASE,
        beat: float = BEAT,
    ) -> None:
        self.settings, self.database, self.bases, self.name = settings, database, bases, name
        self.command, self.lease_seconds, self.beat_every = command, lease, beat
        self._late: list[Look] = []
        self.leases, self.files, self.jobs = Leases(database), Files(database), Jobs(database)
        self.environment = child_environment(
            LUTHIER_HOME=str(database.home), LUTHIER_HUB=settings.hub, PYTHONUNBUFFERED="1"
        )

    # -- the loops ---------------------------------------------------------------------------------------------------

    def run(self, stop: threading.Event) -> None:
        """Work until `stop` is set; then the running job is saved at a checkpoint and goes back into the queue."""
        faults: list[Exception] = []

        def check() -> None:
            try:
                self._loop("validate", stop)
            except Exception as error:  # noqa: BLE001 (raised below: half a worker would leave jobs waiting for ever)
                faults.append(error)
                stop.set()

        checker = threading.Thread(target=check, name="checker")
        checker.start()
        try:
            self._loop("run", stop)
        finally:
            stop.set()
            checker.join()
            for look in self._late:
                look.end()
        if faults:
            raise faults[0]

    def _loop(self, stage: Stage, stop: threading.Event) -> None:
        while not stop.is_set():
            try:
                busy = self.once(stage, stop)
            except NotNow as error:  # the database does not answer: it may again
                logger.warning("%s: %s", stage, error)
                busy = False
            if not busy:
                stop.wait(IDLE)

    def once(self, stage: Stage, stop: threading.Event) -> bool:
        """Look for one job of that stage and do it; whether there was one. Raises NotNow."""
        if stage == "validate":
            self._tell_late()
            for job in self.leases.reclaim_expired():
                logger.warning("%s taken from a worker that was lost", job.id)
        claimed = self.leases.claim(self.name, self.lease_seconds, stage)
        if claimed is None:
            return False
        job, lease = claimed
        logger.info("%s: %s", job.id, stage)
        with Hold(self.leases, lease, job, self.beat_every) as hold, self._guarded(job, lease, hold):
            if stage == "validate":
                self._check_files(job, lease, hold, stop)
            else:
                self._carry_out(job, lease, hold, stop)
        return True

    @contextlib.contextmanager
    def _guarded(self, job: Job, lease: Lease, hold: Hold) -> Iterator[None]:
        """Whatever goes wrong with one job is written down as its end, and ends nothing else."""
        try:
            try:
                yield
            except (LeaseLost, NotNow):
                raise
            except LuthierError as error:
                self._fail(job, lease, error.code, error.message, error.param)
            except OSError as error:
                self._fail(job, lease, "unavailable", f"The worker's disk refuses: {error.strerror or error}.", None)
            except Exception as error:  # the edge of a job: it is told, and the worker lives
                logger.exception("%s", job.id)
                self._fail(job, lease, "internal", f"The worker failed: {type(error).__name__}.", None)
        except LeaseLost:
            logger.warning("%s is no longer ours", job.id)
        except NotNow as error:
            if hold.lost:
                logger.warning("%s is no longer ours: %s", job.id, error)
            else:  # a full disk, most often: say so, when the database takes it
                with contextlib.suppress(LeaseLost):
                    self._fail(job, lease, error.code, error.message, error.param)

    def _fail(self, job: Job, lease: Lease, code: str, message: str, param: str | None) -> None:
        """No path of this machine reaches a client."""
        shown = message.replace(str(self.database.home / "runs" / job.id), "the run folder")
        shown = shown.replace(str(self.database.home), "the data folder")
        logger.warning("%s failed: %s", job.id, message)
        self.leases.fail(lease, code=code, message=shown, param=param)

    # -- files -------------------------------------------------------------------------------------------------------

    def _check_files(self, job: Job, lease: Lease, hold: Hold, stop: threading.Event) -> None:
        refusal: Refusal | None
        try:
            asked = {
                "training": str(blob_of(self.files, "training", job.training_file)),
                "validation": job.validation_file and str(blob_of(self.files, "validation", job.validation_file)),
                "kind": job.kind,
                "method": job.method,
            }
        except FileGone as error:
            refusal = Refusal(error.code, error.message, error.param)
        else:
            with TemporaryDirectory(prefix="luthier-check-") as folder:
                output, log = Path(folder) / "verdict", Path(folder) / "log"
                command = [sys.executable, "-m", "luthier.work.validate"]
                given = json.dumps(asked).encode()
                with Child(command, log=log, environment=self.environment, input=given, output=output) as child:
                    while (code := child.poll()) is None:
                        hold.check()
                        if stop.is_set():
                            self.leases.release(lease)
                            return
                        time.sleep(PATIENCE / 2)
                said = log.read_text(errors="replace")
                refusal = unread(code, said) if code else verdict_of(output.read_text())
                if code:
                    logger.warning("%s: %s", job.id, said)
        if refusal is None:
            if not self._look_at_data(job, lease, hold, stop):
                return
            self.leases.validated(lease)
        else:
            self._fail(job, lease, refusal.code, refusal.message, refusal.param)

    def _look_at_data(self, job: Job, lease: Lease, hold: Hold, stop: threading.Event) -> bool:
        """Tell what the data doctor finds within a few seconds; what takes longer is told later. False: the worker
        shall stop, and the job waits for the next one."""
        try:
            look = Look(job, self.files, self.environment)
        except NotFound:  # deleted since: the run says so
            return True
        deadline = time.monotonic() + findings.SECONDS
        try:
            while not look.done():
                hold.check()
                if stop.is_set():
                    self.leases.release(lease)
                    return False
                if time.monotonic() >= deadline and len(self._late) < findings.MOST_LATE:
                    self._late.append(look)
                    return True
                if time.monotonic() >= deadline:
                    logger.warning("%s: too many files are being looked at, this one is not", job.id)
                    return True
                time.sleep(PATIENCE / 2)
            self.leases.append_events(lease, look.events())
            return True
        finally:
            if look not in self._late:
                look.end()

    def _tell_late(self) -> None:
        """The findings of jobs that did not wait for them. Raises NotNow."""
        for look in list(self._late):
            if look.done():
                self.leases.append_late(look.job.id, look.events())
                self._late.remove(look)

    # -- training ----------------------------------------------------------------------------------------------------

    def _carry_out(self, job: Job, lease: Lease, hold: Hold, stop: threading.Event) -> None:
        run = lay_out(self.database, self.bases, job)
        self.leases.record(lease, run_folder=run.path)
        recorder = Recorder(self.database, job, lease, run, self.settings.organization)
        fate = Fate("failed")
        try:
            fate = Attempt(run, recorder, hold, stop, self.command(run), self.environment).to_the_end()
            if fate.kind == "finished":
                self._succeed(job, lease, run, recorder)
            elif fate.kind == "failed":
                self._fail(job, lease, fate.code, fate.message, fate.param)
            else:
                self.leases.release(lease)
        finally:
            recorder.trackers.finish("succeeded" if fate.kind == "finished" else fate.kind)
        if self.jobs.get(job.id).status in TERMINAL:  # what the client deletes shall be gone
            for left in ("data", "answers"):
                shutil.rmtree(run.path / left, ignore_errors=True)
            for name in REPORTS:  # they show held-out rows
                (run.path / name).unlink(missing_ok=True)

    def _succeed(self, job: Job, lease: Lease, run: RunFolder, recorder: Recorder) -> None:
        """Model and result file, then the end. Repeated after a crash it comes to the same."""
        model = recorder.register(run.model)
        if gate := (recorder.terminal or {})["report"].get("gate"):
            Aliases(self.database).judge(model.name, Verdict(gate["passed"], gate["reasons"]))
        results = self._result_files(job, run)
        tokens = int((recorder.terminal or {})["report"]["trained_tokens"])
        try:
            ended = self.leases.finish(lease, fine_tuned_model=model.name, result_files=results, trained_tokens=tokens)
        except LeaseLost:
            ended = self.jobs.get(job.id)  # whoever has the job now may be about to register the same
            if ended.status not in ("cancelled", "failed"):
                raise
        if ended.status != "succeeded":
            unregister(recorder.models, model.name)
            for result in results:
                with contextlib.suppress(NotFound):
                    self.files.delete(result)

    def _result_files(self, job: Job, run: RunFolder) -> list[str]:
        """The ids of the job's result files; the note beside the run remembers them for a repeated end.

        The table of steps comes first, where clients look for it; the report and its page follow when there is a
        proof or a number of the meter, except for a fine-tune of the older API: its clients take one file for granted.
        """
        note = run.path / "result.json"
        if note.is_file():
            with contextlib.suppress(NotFound, ValueError, KeyError, TypeError):
                return [self.files.get(known).id for known in json.loads(note.read_text())["ids"]]
        contents = {FILENAMES[job.kind]: result_table(run, job)}
        now = self.jobs.get(job.id)
        if job.kind == "modern" and (now.proof is not None or now.forgetting is not None):
            contents |= {name: (run.path / name).read_bytes() for name in REPORTS}
        made = [
            self.files.create([content], filename=name, purpose="fine-tune-results").id
            for name, content in contents.items()
        ]
        write_json(note, {"ids": made})
        return made
