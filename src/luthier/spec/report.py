"""What a finished run measured, as written to RUN/report.json and printed by `luthier evaluate`."""

from __future__ import annotations

from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field

from luthier.spec.forecast import Forecast
from luthier.spec.forgetting import Forgetting
from luthier.spec.gate import Gate
from luthier.spec.keeping import Keeping
from luthier.spec.learning import Learning
from luthier.spec.proof import Proof

PartName = Literal["training", "proof", "curve", "forgetting"]
PARTS: tuple[PartName, ...] = get_args(PartName)


class Score(BaseModel):
    """One model on one set of held-out rows. Absent measures are null, never 0."""

    model_config = ConfigDict(extra="forbid")

    rows: int = Field(description="Rows measured.")
    loss: float | None = Field(
        default=None, description="Mean negative log-likelihood per supervised token, nats; of pairs the mean DPO loss."
    )
    token_accuracy: float | None = Field(default=None, description="Share of supervised tokens that are the argmax.")
    exact_match: float | None = Field(default=None, description="Share of greedy answers equal to the reference.")
    preference_accuracy: float | None = Field(
        default=None, description="Share of pairs whose preferred answer the model finds likelier than the other."
    )
    supervised_tokens: int = 0


class Sample(BaseModel):
    """A held-out prompt with the reference answer and what each model said."""

    prompt: str
    wanted: str
    base: str | None = None
    tuned: str | None = None


class Part(BaseModel):
    """One part of a run: what it was to take, what it took."""

    model_config = ConfigDict(extra="forbid")

    name: PartName
    foretold: float | None = Field(description="Seconds of the forecast; null when there was none.")
    seconds: float
    share: float = Field(description="Of the training's seconds.")


class Report(BaseModel):
    """RUN/report.json."""

    model_config = ConfigDict(extra="forbid")

    base: Score | None = None
    tuned: Score | None = None
    samples: list[Sample] = []
    steps: int = 0
    epochs: float = Field(default=0, description="Passes over the data that were taken.")
    replayed_rows: int = Field(default=0, description="General rows that were mixed in, of those trained on.")
    trained_tokens: int = Field(default=0, description="Tokens of all rows trained on, times epochs (logical).")
    supervised_tokens: int = Field(default=0, description="The part of them that carried loss.")
    physical_tokens: int = Field(default=0, description="Tokens computed: shared prefixes once.")
    tree_ratio: float | None = Field(default=None, description="trained_tokens / physical_tokens.")
    train_loss_first: float | None = None
    train_loss_last: float | None = None
    validation_loss_best: float | None = None
    best_step: int | None = None
    seconds: float = Field(default=0.0, description="Wall time of all attempts at the run.")
    peak_memory_bytes: int | None = None
    weights_changed: bool | None = Field(default=None, description="Checked against the start before publishing.")
    proof: Proof | None = Field(default=None, description="Whether it helped, by what the models answered.")
    proof_note: str | None = Field(default=None, description="Why there is no proof, when there should be one.")
    learning: Learning | None = Field(default=None, description="The metric at each published checkpoint.")
    forgetting: Forgetting | None = Field(default=None, description="What was lost of general abilities.")
    keeping: Keeping | None = Field(default=None, description="The scale that was chosen, and what others give.")
    gate: Gate | None = Field(default=None, description="Whether it kept to the thresholds; null without any.")
    forecast: Forecast | None = Field(default=None, description="What was foretold before the first step.")
    parts: list[Part] = Field(default=[], description="What the forecast said of the parts beside what they took.")

    def told(self) -> dict[str, Any]:
        """As the last event of a run tells it: without the rows of the proof, which may be long."""
        return self.model_dump(exclude={"proof": {"rows"}})
