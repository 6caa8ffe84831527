"""One run: a process of one system on one case, with a folder whose result.json says that it is done.

A run that is done is never done again: its folder is named by everything that it depends on, the case's rows, the
system's code and versions, the settings. So a benchmark that was cut off goes on where it was.
Does not know: what results are compared with.
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.training import environments, workloads
from benchmarks.training.systems import HERE, System
from benchmarks.training.workloads import Case

ROOT = HERE.parent.parent
ENDED = (-15, 124, 143)  # exit codes of a process that was asked to end
REFERENCE_USES = ("peft==", "torch==", "transformers==")  # of our own environment


@dataclass(frozen=True)
class Place:
    """Where things lie, the command that every run is started through ("" for none), and what tuned peers compute in:
    whatever the processor multiplies faster, as every trainer can be told."""

    folder: Path
    launcher: str
    precision: str = "bfloat16"  # | float32

    def kept(self, what: str) -> Path:
        """The folder of all results of a kind, which are results at this precision."""
        return self.folder / (what if self.precision == "bfloat16" else f"{what}-{self.precision}")

    def model(self, case: Case) -> Path:
        from luthier.engine import catalogue

        return catalogue.resolve(case.model)

    def workload(self, case: Case) -> Path:
        """The rows' file. Raises SystemExit when they are not the frozen ones."""
        path = self.folder / "workloads" / f"{rows_name(case)}.safetensors"
        if not path.is_file():
            workloads.save(workloads.make(case, self.model(case) / "tokenizer.json"), path)
        return path

    def adapter(self, case: Case) -> Path:
        """The adapter that everybody starts from, made when it is not there."""
        path = self.folder / "adapters" / f"{case.model}-{code('drivers/start.py')}"
        if not (path / "adapter_config.json").is_file():
            from benchmarks.training.drivers import start

            start.make(str(self.model(case)), path)
        return path


def code(*names: str) -> str:
    """Hash of files of this folder."""
    total = hashlib.sha256()
    for name in names:
        total.update((HERE / name).read_bytes())
    return total.hexdigest()[:10]


def engine_code() -> str:
    """Hash of the engine's sources: what `luthier` stands for in a result."""
    total = hashlib.sha256()
    for room in ("engine", "data"):
        folder = ROOT / "src" / "luthier" / room
        for path in sorted(path for kind in ("*.py", "*.cpp", "*.h") for path in folder.rglob(kind)):
            total.update(path.read_bytes())
    return total.hexdigest()[:10]


def version(system: System) -> str:
    """What a system's figures belong to: its versions, or for Luthier its sources."""
    if system.driver.startswith("luthier_"):
        return engine_code()
    if system.environment:
        return environments.digest(system.requirements)
    lines = (ROOT / "requirements.lock").read_text(encoding="utf-8").splitlines()
    pins = [line.partition("#")[0].strip() for line in lines if line.startswith(REFERENCE_USES)]
    return hashlib.sha256("\n".join(pins).encode()).hexdigest()[:10]


def label(system: System) -> str:
    """A system by name and by all of its code that a result depends on."""
    shared = ["job", "start", "judge", "flat", *(["callback"] if system.environment else [])]
    driver = code(*(f"drivers/{name}.py" for name in dict.fromkeys([system.driver, *shared])))
    return f"{system.name}-{version(system)}-{driver}"


def rows_name(case: Case) -> str:
    return f"{case.name}-{workloads.HASHES[case.shape, case.model][:12]}"


@dataclass(frozen=True)
class Ask:
    """What of a case is run: rows in a step, steps, rows in a micro-batch, seconds after which no step is begun."""

    rows: int
    steps: int
    micro: int
    seconds: float
    gradients: bool = False
    keep_every: int = 0
    without: tuple[str, ...] = ()


def do(place: Place, case: Case, system: System, out: Path, ask: Ask) -> dict[str, Any] | None:
    """The result of a run, carried out unless it is there. None when the process failed; its log says why."""
    result = load(out / "result.json")
    if result is not None:
        return result
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    job = {
        "model": str(place.model(case)),
        "workload": str(place.workload(case)),
        "adapter": str(place.adapter(case)),
        "out": str(out),
        "setting": system.setting,
        "precision": place.precision,
        "rows_per_step": ask.rows,
        "steps": ask.steps,
        "micro": ask.micro,
        "rate": case.rate,
        "full": case.full,
        "seconds": ask.seconds,
        "gradients": ask.gradients,
        "keep_every": ask.keep_every,
        "without": list(ask.without),
    }
    (out / "job.json").write_text(json.dumps(job, indent=1), encoding="utf-8")
    python = environments.python_of(system.requirements, place.folder / "peers") if system.environment else None
    start(place, system.driver, out, python)
    shutil.rmtree(out / "run", ignore_errors=True)
    shutil.rmtree(out / "trainer", ignore_errors=True)
    return load(out / "result.json")


def judged(place: Place, out: Path) -> dict[str, float] | None:
    """Held-out losses by step of a run that kept what it learnt; what it kept is removed. None when that failed."""
    if not (out / "judged.json").is_file():
        start(place, "judge", out, None)
    found = load(out / "judged.json")
    if found is not None:
        for path in out.glob("weights-*.safetensors"):
            path.unlink()
    return found


def start(place: Place, driver: str, out: Path, python: Path | None) -> None:
    """Run a driver on the job in `out` and wait for it; what it says goes to `out`/log.

    Raises SystemExit when it was ended from outside, which says nothing about the trainer.
    """
    command = [
        *shlex.split(place.launcher),
        str(python or sys.executable),
        "-m",
        f"benchmarks.training.drivers.{driver}",
    ]
    with (out / "log").open("ab") as said:
        done = subprocess.run([*command, str(out / "job.json")], stdout=said, stderr=said, env=_environment(), cwd=ROOT)
    if done.returncode in ENDED:
        raise SystemExit(f"{out}: its process was ended from outside. The same command goes on from here.")


def last_words(out: Path) -> str:
    """The last line of a run's log: why it failed."""
    lines = (out / "log").read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1].strip() if lines else "it said nothing"


def _environment() -> dict[str, str]:
    """Of every run: all cores, no hub, no progress bars; the same for everybody."""
    threads = os.environ.get("OMP_NUM_THREADS", str(os.cpu_count()))
    ours = {
        "PYTHONPATH": f"{ROOT}:{ROOT / 'src'}",
        "OMP_NUM_THREADS": threads,
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    }
    return {**os.environ, **ours}


def load(path: Path) -> dict[str, Any] | None:
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else None


def now() -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.gmtime())
