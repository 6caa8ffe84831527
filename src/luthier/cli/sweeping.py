"""A sweep's folder and its trials, carried out one after another; what is known of it is what its runs have written.

    SWEEP/
      sweep.json     what was asked, written once everything before the first trial is there
      rows/          the rows to train on, to decide by, to prove with, when the sweep parted them
      trials/01 ...  ordinary run folders
      deaths.jsonl   engines that died without a word, a line each
      results.json   what came of it so far; report.html: the same as a page
      lock           held (flock) by the process that carries it out

Nothing is remembered but by files that appear whole and lines that are appended whole, so a sweep that was killed goes
on where it was: a rung that was measured is not measured again, a trial that was cut short goes on from its checkpoint.
Does not know: options, terminals, torch.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import time
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, Protocol

from luthier.cli.follow import INTERRUPTED, Outcome, View, engine_command, follow
from luthier.cli.output import short, typed
from luthier.spec.errors import BadSetting, LuthierError, NotFound, NotNow, UserError
from luthier.spec.job import TrainRequest
from luthier.spec.keeping import KEPT_SHARE
from luthier.spec.report import Report
from luthier.spec.run import RunFolder, append_line, write_json, write_whole
from luthier.spec.sweep import Asked, Result, Rung, Trial, combinations, command_words, plan, ranked

WAIT = 0.5  # seconds between two looks at an engine that outlived an earlier attempt
STOPS_ALL = {"unavailable": NotNow, "invalid_data": UserError}  # what ends a trial and would end every other


class Interrupted(Exception):
    """Ctrl-C: the trial at work is at a checkpoint."""


class Watcher(View, Protocol):
    """Whoever shows a sweep: a View of the trial at work that also hears of the whole."""

    def begin(self, result: Result, trial: Trial, share: Fraction | None) -> None: ...


class Folder:
    """Paths of a sweep, and its lock."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).expanduser().absolute()
        self.asked, self.results = self.path / "sweep.json", self.path / "results.json"
        self.page, self.rows, self.trials = self.path / "report.html", self.path / "rows", self.path / "trials"
        self.deaths = self.path / "deaths.jsonl"

    def read(self) -> Asked | None:
        """What was asked; None when no sweep was begun here. Raises BadSetting for a damaged one."""
        try:
            return Asked.model_validate_json(self.asked.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise BadSetting(f"{self.asked} cannot be read: {' '.join(str(error).split())}", param="out") from error

    @contextlib.contextmanager
    def owned(self) -> Iterator[None]:
        """Raises NotNow while another process carries out this sweep, or when the folder cannot be made."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = open(self.path / "lock", "a+")  # noqa: SIM115 - closed below
        except OSError as error:
            raise NotNow(f"{self.path} cannot be written: {error.strerror}.", param="out") from error
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise NotNow(f"Another process carries out the sweep {self.path}.", param="out") from error
            yield

    def died(self, trial: Trial, message: str) -> None:
        append_line(self.deaths, json.dumps({"trial": trial.number, "message": message}))

    def deaths_told(self) -> dict[int, str]:
        """Why the engine of a trial ended, where it could not say so itself."""
        found: dict[int, str] = {}
        if self.deaths.is_file():
            for line in self.deaths.read_text(encoding="utf-8").splitlines():
                with contextlib.suppress(ValueError, KeyError, TypeError):
                    told = json.loads(line)
                    found[int(told["trial"])] = str(told["message"])
        return found


class Sweep:
    """The trials, as far as they have come."""

    def __init__(self, folder: Folder, asked: Asked, view: Watcher, processes: int = 1) -> None:
        self.folder, self.asked, self.view, self.processes = folder, asked, view, processes
        values = combinations(asked.request, asked.grid)
        width = max(2, len(str(len(values))))
        trials = [
            Trial(number=n, values=each, run=str(folder.trials / f"{n:0{width}}")) for n, each in enumerate(values, 1)
        ]
        self.rungs = plan(len(trials), asked.halving)
        self.result = Result(
            by=asked.by,
            halving=asked.halving,
            kept_apart=asked.kept_apart,
            shares=[str(share) for share, _ in self.rungs],
            trials=trials,
            rule=rule_words(asked, self.rungs),
        )
        for trial in trials:
            self._look(trial)

    def go(self) -> Result:
        """Carry it out to its end. Raises Interrupted, and what would end every trial: NotNow, UserError."""
        while True:
            order = self._race()
            if not order:
                self.result.status = "failed"
                break
            if self._finished(order[0]):
                break
        self._write()
        return self.result

    def _race(self) -> list[Trial]:
        """Every rung; the trials that reached the last one, best first. A trial that fails is replaced by the next."""
        order = list(self.result.trials)
        reached: list[Trial] = []
        for share, count in self.rungs:
            reached = []
            for trial in order:
                if len(reached) == count:
                    break
                if trial.failed is None and trial.at(share) is None:
                    self._carry(trial, share)
                if trial.failed is None:
                    reached.append(trial)
            best = ranked(reached, share, self.asked.by)
            order = [*best, *(trial for trial in order if trial not in best and trial.failed is None)]
        return order[: len(reached)]

    def _carry(self, trial: Trial, share: Fraction) -> None:
        """Take `trial` to that share of its steps, unless it fails on the way."""
        run = self._laid_out(trial)
        part = ("--score" if self.asked.by == "metric" else "--part", str(share))
        outcome = self._engine(run, trial, share, part)
        if outcome is not None and trial.failed is None and trial.at(share) is None:
            raise Interrupted
        self._write()
        if outcome is not None and outcome.exit_code == INTERRUPTED:  # when it had come there anyway
            raise Interrupted

    def _finished(self, winner: Trial) -> bool:
        """Publish and prove the winner; False when that fails, and the next best is to take its place."""
        run = RunFolder(winner.run)
        if not run.model.is_dir() or self._last(run) != "finished":
            if self._engine(run, winner, None, ()) is not None and winner.failed is None and not run.model.is_dir():
                raise Interrupted
            if winner.failed is not None:
                return False
        report = Report.model_validate_json(run.report.read_text(encoding="utf-8"))
        settings = json.loads(run.spec.read_text(encoding="utf-8"))["settings"]
        request = TrainRequest.model_validate_json(run.request.read_text(encoding="utf-8"))
        out = f"runs/{self.folder.path.name}-again"
        found = self.result
        found.status, found.winner = "finished", winner.number
        found.proof, found.proof_note = report.proof, report.proof_note
        found.command = typed(*command_words(request, settings, out))
        for trial in found.trials:
            trial.status = "won" if trial is winner else "failed" if trial.failed is not None else "left"
        return True

    def _engine(self, run: RunFolder, trial: Trial, share: Fraction | None, part: Sequence[str]) -> Outcome | None:
        """An engine on `run` to its end; None when one of an earlier attempt did the work meanwhile."""
        if self._waited(run):
            self._look(trial)
            if trial.failed is not None or (share is not None and trial.at(share) is not None):
                return None
        self.view.begin(self.result, trial, share)
        run.stop_note.unlink(missing_ok=True)
        outcome = follow(run, engine_command(run, self.processes, part=part), self.view)
        if outcome.status == "failed":
            stops = STOPS_ALL.get(str(outcome.event.get("code")))
            if stops is not None:
                raise stops(f"Trial {trial.number}: {outcome.event['message']}", hint=outcome.event.get("hint"))
            if self._last(run) != "failed":
                self.folder.died(trial, str(outcome.event["message"]))
        self._look(trial)
        return outcome

    def _laid_out(self, trial: Trial) -> RunFolder:
        run = RunFolder(trial.run)
        if not run.request.is_file():
            run.create({**self.asked.request, **self._precision(), **trial.values})
        return run

    def _precision(self) -> dict[str, str]:
        """What `auto` came to in the first trial that got so far: timed anew, another could come to something else."""
        if self.asked.request.get("precision", "auto") == "auto":
            for trial in self.result.trials:
                with contextlib.suppress(OSError, ValueError, KeyError):
                    spec = json.loads(RunFolder(trial.run).spec.read_text(encoding="utf-8"))
                    return {"precision": str(spec["settings"]["precision"])}
        return {}

    def _waited(self, run: RunFolder) -> bool:
        """Whether an engine that outlived an earlier attempt was at work here; it is waited for."""
        waited = False
        while True:
            try:
                with run.owned():
                    return waited
            except NotNow:
                if not waited:
                    self.view.say(f"An engine of an earlier attempt is at work in {short(run.path)}: waiting for it.")
                waited = True
                time.sleep(WAIT)

    def _look(self, trial: Trial) -> None:
        """What the run has written."""
        run = RunFolder(trial.run)
        rungs: dict[str, Rung] = {}
        trial.failed = self.folder.deaths_told().get(trial.number)
        for _, event in run.events():
            if event["type"] == "rung":
                rungs[event["share"]] = Rung(**{name: event[name] for name in Rung.model_fields})
            if event["type"] == "failed" and event["code"] not in STOPS_ALL:
                trial.failed = " ".join(filter(None, (event["message"], event["hint"])))
        trial.rungs = list(rungs.values())
        if trial.failed is not None:
            trial.status = "failed"

    def _last(self, run: RunFolder) -> str:
        last = ""
        for _, event in run.events():
            last = str(event["type"])
        return last

    def _write(self) -> None:
        """The results as they are, whole."""
        from luthier.proof.sweep_page import page

        spent = 0.0
        for trial in self.result.trials:
            with contextlib.suppress(OSError, ValueError):
                spent += float(json.loads(RunFolder(trial.run).report.read_text(encoding="utf-8"))["seconds"])
        self.result.seconds = round(spent, 2)
        write_json(self.folder.results, self.result.model_dump())
        write_whole(self.folder.page, page(self.result, self.curves()))

    def curves(self) -> dict[int, list[tuple[float, float]]]:
        """(share of its steps, loss of the deciding rows) of each trial, wherever it was measured."""
        found: dict[int, list[tuple[float, float]]] = {}
        for trial in self.result.trials:
            steps, points = 0, {}
            for _, event in RunFolder(trial.run).events():
                if event["type"] == "prepared":
                    steps = int(event["steps"])
                elif event["type"] == "validation" and event["loss"] is not None and steps:
                    points[event["step"] / steps] = float(event["loss"])
            found[trial.number] = sorted(points.items())
        return found


def rule_words(asked: Asked, rungs: Sequence[tuple[Fraction, int]]) -> str:
    """How the winner is chosen, in a sentence."""
    by = "loss on the deciding rows" if asked.by == "loss" else "the proof's metric on the deciding rows"
    if asked.by == "metric" and asked.request.get("keep_general"):
        by = f"what was forgotten, of those that keep {KEPT_SHARE:.0%} of the best gain on the deciding rows"
    if len(rungs) == 1:
        return f"Every trial goes to its end; the best by {by} wins."
    went = ", ".join(f"{count} to {share} of their steps" for share, count in rungs[:-1])
    return f"Successive halving by {by}: {went}, the best one to its end; one in {asked.halving} goes on."


# -- before the first trial --------------------------------------------------------------------------------------------


def keep_apart(values: dict[str, Any], folder: Folder, seed: int) -> tuple[dict[str, Any], str]:
    """(data, validation and proof_data of every trial; where they come from, in words): rows that decide and rows that
    prove are never the same, and no prompt is in two parts unless files of the user's own have it so.

    Raises BadSetting, BadData for rows that cannot be parted.
    """
    from luthier.spec.job import validation_share

    data, validation, proof = values["data"], values.get("validation"), values.get("proof_data")
    share = validation_share(validation) if validation is not None else validation_share("auto")
    beside = folder.path / ".rows.tmp"
    made: dict[str, Any] = {}
    words = ""
    with _fresh(beside, folder.rows) as part:
        if share is None and validation is not None:
            if proof is None:
                part(str(validation), "decide", "proof", 0.5, seed)
                made, words = {"validation": "decide", "proof_data": "proof"}, f"Halves of {short(validation)}"
            else:
                words = f"{short(validation)} decides, {short(proof)} proves{_both(validation, proof)}"
        else:
            if len(data) > 1:
                raise BadSetting(
                    "Several data files are not parted: a prompt may be in two of them.",
                    hint="Name the rows that decide and those that prove: --validation FILE --proof-data FILE.",
                    param="validation",
                )
            held = _share(validation, share or 0.0, Path(data[0]))
            words = f"{held:.1%} of {short(data[0])} decides"
            made = {"data": "train", "validation": "decide"}
            if proof is not None:
                part(data[0], "train", "decide", held, seed)
                words += f", {short(proof)} proves{_both(data[0], proof)}"
            else:
                if held >= 0.5:
                    raise BadSetting(
                        f"--validation: found {validation}; as much again is held out for the proof.",
                        hint="Hold out less than half, or name the proof's rows: --proof-data FILE.",
                        param="validation",
                    )
                held_out = part(data[0], "train", "held", 2 * held, seed)
                part(str(held_out), "decide", "proof", 0.5, seed)
                held_out.unlink()
                made["proof_data"], words = "proof", f"{words}, {held:.1%} proves; whole prompts"
    found = {name: str(next(folder.rows.glob(f"{which}.*"))) for name, which in made.items()}
    return {**values, **{name: [path] if name == "data" else path for name, path in found.items()}}, f"{words}."


@contextlib.contextmanager
def _fresh(beside: Path, place: Path) -> Iterator[Callable[[str, str, str, float, int], Path]]:
    """`place` appears whole: parts are written into `beside`, which then takes its name. An earlier one that was never
    used goes."""
    import shutil

    from luthier.data.split import split_file

    for left in (beside, place):
        shutil.rmtree(left, ignore_errors=True)
    beside.mkdir(parents=True)

    def part(source: str, first: str, second: str, share: float, seed: int) -> Path:
        whole = Path(source)
        names = [beside / f"{name}{whole.suffix or '.jsonl'}" for name in (first, second)]
        split_file(whole, *names, share=share, seed=seed)
        return names[1]

    yield part
    beside.rename(place)


def _share(validation: Any, share: float, data: Path) -> float:
    """The share to hold out; of `auto` a tenth, at most about 500 rows."""
    from luthier.data.pairs import holds_pairs, read_meanings
    from luthier.spec.job import auto_validation_share

    if validation not in (None, "auto"):
        return share
    return auto_validation_share(sum(1 for _ in read_meanings(data, holds_pairs(data))))


def _both(one: str, other: str) -> str:
    """How many prompts of `other` are in `one` too, in words; nothing when there are none."""
    from luthier.data.pairs import holds_pairs, read_meanings
    from luthier.data.split import prompt_key
    from luthier.spec.data import Problem

    keys = [
        {prompt_key(item) for item in read_meanings(path, holds_pairs(path)) if not isinstance(item, Problem)}
        for path in map(Path, (one, other))
    ]
    count = len(keys[0] & keys[1])
    return f" (but {count} prompts of the proof are in the other file too)" if count else ""


def hashes(values: dict[str, Any]) -> dict[str, str]:
    """SHA-256 of every file that trials read."""
    from luthier.data.read import hash_file

    paths = [
        *values["data"],
        *(values[name] for name in ("validation", "proof_data", "replay_data") if values.get(name)),
    ]
    return {path: hash_file(Path(path)) for path in paths}


def refuse_changed(asked: Asked) -> None:
    """Raises BadSetting when a file is no longer what it was when the sweep began: trials would not compare."""
    for path, known in asked.files.items():
        try:
            same = hashes({"data": [path]})[path] == known
        except NotFound:
            same = False
        if not same:
            raise BadSetting(
                f"{short(path)} is not what it was when the sweep began, so its trials would not compare.",
                hint="Put it back as it was, or start another sweep with another --out.",
                param="data",
            )


def failure_words(result: Result) -> LuthierError:
    """When no trial is left."""
    first = next(trial for trial in result.trials if trial.failed is not None)
    return UserError(
        f"All {len(result.trials)} trials failed; the first ({first.words}): {first.failed}",
        hint="Try smaller learning rates, or look at one alone with `luthier train`.",
    )
