"""A sweep: which settings are tried, how far each goes before the worse ones are left, and what came of it.

Successive halving (Jamieson and Talwalkar 2016; its shares of a schedule as Li et al. 2018, "Hyperband", have them): of
n trials each takes a share of its steps, one in `halving` goes on, until one is left and goes to its end. Which goes on
is decided by the deciding rows alone; the rows of the proof are asked once, of the winner.
Does not know: how a trial is trained or measured.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from fractions import Fraction
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from luthier.spec.errors import BadSetting
from luthier.spec.job import TrainRequest, make_request
from luthier.spec.keeping import KEPT_SHARE
from luthier.spec.proof import Proof

# Options that take several values.
GRID = ("learning_rate", "learning_rate_multiplier", "rank", "epochs", "batch_size", "beta")
USUAL = {"learning_rate_multiplier": ["0.3", "1", "3"]}  # tried when nothing is given more than one value
MOST_TRIALS = 64
By = Literal["loss", "metric"]
Status = Literal["waiting", "left", "failed", "won"]


class Said(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Rung(Said):
    """One trial at one rung, measured on the deciding rows."""

    share: str = Field(description="Of its steps, as N/D.")
    step: int
    steps: int = Field(description="Of its whole schedule.")
    loss: float | None = Field(description="Per learnt token of the deciding rows, nats.")
    metric: str | None = None
    higher_is_better: bool | None = None
    score: float | None = Field(default=None, description="By the metric; null unless that decides.")
    base: float | None = Field(default=None, description="The base's score on the same rows.")
    forgetting: float | None = Field(default=None, description="General ability lost, on the items that choose.")
    rows: int = 0

    @property
    def gain(self) -> float | None:
        """How much better than the base's the score is; null unless both are known."""
        if self.score is None or self.base is None:
            return None
        return self.score - self.base if self.higher_is_better else self.base - self.score


class Trial(Said):
    """One setting. `run` is an ordinary run folder."""

    number: int
    values: dict[str, Any] = Field(description="What tells it from the others.")
    run: str
    status: Status = "waiting"
    rungs: list[Rung] = []
    failed: str | None = Field(default=None, description="Why it failed, in words.")

    def at(self, share: Fraction) -> Rung | None:
        return next((rung for rung in self.rungs if Fraction(rung.share) == share), None)

    @property
    def words(self) -> str:
        return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in self.values.items()) or "as asked"


class Asked(Said):
    """What a sweep was asked; SWEEP/sweep.json. `files`: SHA-256 of each file that its trials read."""

    request: dict[str, Any] = Field(description="What all trials share.")
    grid: dict[str, list[Any]]
    halving: int
    by: By
    given: dict[str, Any] = Field(description="The command's options, so that the same command goes on.")
    files: dict[str, str] = {}
    kept_apart: str = Field(description="Where the deciding rows and the rows of the proof come from.")


class Result(Said):
    """SWEEP/results.json, written anew whenever something was measured."""

    status: Literal["running", "finished", "failed"] = "running"
    by: By
    halving: int
    kept_apart: str
    shares: list[str] = Field(description="The rungs, as shares of each trial's steps.")
    trials: list[Trial]
    winner: int | None = None
    rule: str = ""
    command: str | None = Field(default=None, description="What trains the winner again, to the same weights.")
    proof: Proof | None = Field(default=None, description="Of the winner, on rows that decided nothing.")
    proof_note: str | None = None
    seconds: float = Field(default=0.0, description="Wall time of all trials.")


def combinations(request: dict[str, Any], grid: dict[str, list[Any]]) -> list[dict[str, Any]]:
    """The values of each trial, in the grid's order. Raises BadSetting for a combination that no run can have."""
    names = list(grid)
    found = [dict(zip(names, values, strict=True)) for values in itertools.product(*grid.values())]
    if len(found) > MOST_TRIALS:
        sizes = " x ".join(str(len(values)) for values in grid.values())
        raise BadSetting(
            f"The grid has {len(found)} trials ({sizes}); at most {MOST_TRIALS} are tried.", hint="Leave values out."
        )
    for values in found:
        make_request({**request, **values})
    return found


def read_grid(given: dict[str, Any]) -> tuple[dict[str, Any], dict[str, list[Any]]]:
    """(options that all trials share, several values by option), from options as texts: commas part values.

    The values are those of the request's types. Raises BadSetting for a value that is none.
    """
    several = {name: _parts(str(given[name])) for name in GRID if name in given and "," in str(given[name])}
    shared = {name: value for name, value in given.items() if name not in several}
    if not several and "learning_rate_multiplier" not in given:
        several = dict(USUAL)
    typed: dict[str, list[Any]] = {}
    for name, values in several.items():
        around = {"model": "any", "data": ["any"], "objective": given.get("objective", "supervised")}
        made = [getattr(make_request({**around, name: value}), name) for value in values]
        typed[name] = list(dict.fromkeys(made))
    return shared, typed


def _parts(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def plan(trials: int, halving: int) -> list[tuple[Fraction, int]]:
    """The rungs: (share of each trial's steps, how many trials go there). One trial goes to its end; with `halving` 1
    nobody is left before it."""
    if halving == 1:
        return [(Fraction(1), trials)]
    counts = [trials]
    while counts[-1] > 1:
        counts.append(max(1, counts[-1] // halving))
    return [(Fraction(1, halving ** (len(counts) - 1 - n)), count) for n, count in enumerate(counts)]


def ranked(trials: Sequence[Trial], share: Fraction, by: By) -> list[Trial]:
    """Those that were measured at that rung, best first; of equals the one of lower loss, then the earlier one.

    Where it was measured what each forgot: first those that keep KEPT_SHARE of the best gain on the base, of them the
    one that forgot least; then the others by their gain.
    """
    gains = [rung.gain for trial in trials if (rung := trial.at(share)) is not None]
    best = max((gain for gain in gains if gain is not None), default=0.0)

    def key(trial: Trial) -> tuple[float, float, int]:
        rung = trial.at(share)
        assert rung is not None
        loss = rung.loss if rung.loss is not None else float("inf")
        if by == "loss" or rung.score is None:
            return (loss, loss, trial.number)
        if rung.gain is not None and rung.forgetting is not None and best > 0:
            if rung.gain >= KEPT_SHARE * best - 1e-9:
                return (rung.forgetting - 1000, -rung.gain, trial.number)  # before all that keep less of the gain
            return (-rung.gain, loss, trial.number)
        return (-rung.score if rung.higher_is_better else rung.score, loss, trial.number)

    return sorted((trial for trial in trials if trial.at(share) is not None), key=key)


def command_words(request: TrainRequest, settings: dict[str, Any], out: str) -> list[str]:
    """`luthier train ...` for the same bytes of weights: the request, with what the machine or chance decided."""
    values = request.model_dump(mode="json", exclude_unset=True)
    values |= {name: settings[name] for name in ("seed", "micro_tokens", "precision")}
    words = ["luthier", "train"]
    for name, value in values.items():
        if value is None or value is False or value == []:
            continue
        option = f"--{name.replace('_', '-')}"
        if value is True:
            words.append(option)
        elif name == "data":
            words += [word for path in value for word in (option, str(path))]
        else:
            words += [option, ",".join(map(str, value)) if isinstance(value, list) else str(value)]
    return [*words, "--out", out]
