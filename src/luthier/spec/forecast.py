"""What a run will take, said before it starts: in the event `forecast`, by `luthier estimate`, beside the report.

Does not know: how it is measured (engine/forecast.py).
"""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class Forecast(BaseModel):
    """Seconds, bytes and tokens of a whole run. Tokens of one pass over the data unless said otherwise."""

    model_config = ConfigDict(extra="forbid")

    rows: int = Field(description="Rows to train on.")
    dropped: int = Field(description="Rows left out for their length.")
    truncated: int = Field(description="Rows cut at the longest length.")
    lost_tokens: int = Field(description="Tokens of dropped and cut rows that are not seen.")
    tokens: int = Field(description="Tokens kept.")
    supervised_tokens: int = Field(description="Tokens to learn.")
    tree_ratio: float | None = Field(description="Tokens kept / tokens computed: what shared prefixes save.")
    epochs: int
    steps: int
    micro_batches: int = Field(description="Forward and backward passes of the whole run.")
    reference_seconds: float = Field(default=0.0, description="With dpo: both answers under the start.")
    load_seconds: float = Field(description="Loading, reading and measuring: known by the time of the forecast.")
    train_seconds: float
    validate_seconds: float
    save_seconds: float
    prove_seconds: float = Field(default=0.0, description="The proof; at most about a third of the training.")
    curve_seconds: float = Field(default=0.0, description="The learning curve; at most a twelfth of the training.")
    forget_seconds: float = Field(default=0.0, description="The forgetting meter; at most about a sixth of it.")
    probe_items: int = Field(default=0, description="General items that base and result will be asked; 0: none.")
    peak_memory_bytes: int = Field(description="Most memory that the process will hold.")
    memory_bytes: int | None = Field(description="What the machine can give it, at most; null where that is unknown.")
    disk_bytes: int = Field(description="What the run folder will hold at most.")
    free_disk_bytes: int
    measured: bool = Field(description="Measured for this run; false: known from earlier runs on this machine.")

    @property
    def seconds(self) -> float:
        return sum(seconds for _, seconds in self.parts)

    @property
    def parts(self) -> list[tuple[str, float]]:
        """(word, seconds) in the order of the run; no proof and no meter where there will be none."""
        always = [
            ("loading", self.load_seconds),
            *([("reference", self.reference_seconds)] if self.reference_seconds else []),
            ("training", self.train_seconds),
            ("validating", self.validate_seconds),
            ("saving", self.save_seconds),
        ]
        ending = [("proof", self.prove_seconds), ("curve", self.curve_seconds), ("forgetting", self.forget_seconds)]
        return always + [part for part in ending if part[1]]

    def left(self, train_left: float, steps_left: int) -> float:
        """Seconds until the run is over when `steps_left` steps will take `train_left`."""
        beside = self.validate_seconds + self.save_seconds
        ending = self.prove_seconds + self.curve_seconds + self.forget_seconds
        return train_left + beside * steps_left / self.steps + ending

    def cost(self, per_hour: float) -> float:
        """Money at that rate an hour, in the rate's currency."""
        return per_hour * self.seconds / 3600
