"""What a model lost of its general abilities, as measured beside the model it came from (proof/forgetting.py).

Does not know: how an item is scored, where the items come from.
"""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class PartChange(BaseModel):
    """One kind of items in one language, before and after. `loss` is positive when ability was lost."""

    model_config = ConfigDict(extra="forbid")

    kind: str = Field(description="knowledge, arithmetic, instruction, format or text; a suite's file by its name.")
    language: str = Field(description="en, zh; empty for a suite that does not say.")
    items: int
    before: float = Field(description="Share of the items that were right; of text: perplexity per token.")
    after: float
    chance: float | None = Field(description="The share that guessing gives; null for text.")
    loss: float = Field(description="before - after; of text: 1 - perplexity before / perplexity after.")
    low: float = Field(description="Lower end of the 95% bootstrap interval of `loss`.")
    high: float
    counted: bool = Field(description="False where the model was no better than chance before: nothing to lose.")

    @property
    def name(self) -> str:
        return f"{self.kind} ({self.language})" if self.language else self.kind


class Forgetting(BaseModel):
    """The forgetting meter's report. `loss` is the mean of the counted parts' losses, each part weighing the same."""

    model_config = ConfigDict(extra="forbid")

    loss: float | None = Field(description="Mean loss over the counted parts; null when there is none.")
    low: float | None = Field(description="Lower end of its 95% bootstrap interval (items resampled within parts).")
    high: float | None = None
    items: int = Field(description="Items that were asked of both models.")
    left_out: int = Field(default=0, description="Items longer than the model reads, or of a role it has no place for.")
    probe: str = Field(description="SHA-256 of the items, of how they are scored and of the sample.")
    before: str = Field(description="The model beside which it was measured.")
    parts: list[PartChange]

    @property
    def verdict(self) -> str:
        """One sentence that says no more than the interval does."""
        if self.loss is None or self.low is None or self.high is None:
            return "Nothing can be said: the model was at chance on every part of the probe."
        if self.low > 0:
            return f"It lost general ability: {self.loss:+.1%} (95% interval {self.low:+.1%} to {self.high:+.1%})."
        if self.high < 0:
            return f"It gained general ability: loss {self.loss:+.1%} (interval {self.low:+.1%} to {self.high:+.1%})."
        return f"No loss is shown: {self.loss:+.1%}, and the interval {self.low:+.1%} to {self.high:+.1%} holds 0."
