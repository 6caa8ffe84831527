"""What a proof says: did tuning help, by which measure, on which rows, at what cost. Part of RUN/report.json.

Every figure follows from `rows`: what each way answered and what that scored. Does not know: how anything is measured.
"""

from __future__ import annotations

from typing import Literal, get_args

from pydantic import BaseModel, ConfigDict, Field

WayName = Literal["base", "examples", "tuned"]  # as it came; with examples in the prompt; after tuning
MetricName = Literal[
    "exact_match", "classification", "json", "tool_calls", "numeric", "text", "perplexity", "preference", "grader"
]
Verdict = Literal["helped", "not shown to help", "worse"]
WAYS: tuple[WayName, ...] = get_args(WayName)
METRICS: tuple[str, ...] = get_args(MetricName)
CHOSEN_METRICS = tuple(name for name in METRICS if name not in ("preference", "grader"))  # what a request may name
EXAMPLES = 4  # training rows in the prompt of the way `examples`, when nothing else is asked
LEVEL = 0.05  # a difference counts as shown below this p-value


class _Said(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Interval(_Said):
    """Where the true value lies with 95% confidence."""

    low: float
    high: float
    method: str = Field(description="How it was found.")


class Cost(_Said):
    """What answering took. Seconds are shares of batches; an answer kept from before has those it took then."""

    prompt_tokens: int = Field(description="Over all rows.")
    answer_tokens: int
    seconds: float
    tokens_per_second: float | None = Field(default=None, description="Answer tokens, in batches.")
    latency: float | None = Field(default=None, description="Median seconds of one answer alone.")
    cached: int = Field(default=0, description="Answers that had been written before, for another proof.")


class Way(_Said):
    """One way to answer, over all rows."""

    name: WayName
    score: float | None
    interval: Interval | None = None
    passed: int | None = Field(default=None, description="Rows that reach `pass_mark`; null without one.")
    details: dict[str, float | None] = Field(default_factory=dict, description="Further measures, by name.")
    cost: Cost | None = None


class Comparison(_Said):
    """The tuned model beside another way, row by row."""

    against: WayName
    difference: float = Field(description="Tuned score less the other's.")
    interval: Interval
    p_value: float
    test: str
    verdict: Verdict
    gained: list[int] = Field(default_factory=list, description="Rows that fail the other way and pass tuned.")
    lost: list[int] = Field(default_factory=list, description="Rows that pass the other way and fail tuned.")


class Bin(_Said):
    """Answers given with about the same confidence: its mean, and how many of them were right."""

    rows: int
    confidence: float
    right: int


class ProofRow(_Said):
    """One held-out row. `row` is its 1-based number in the held-out file, or in the data it was split from."""

    row: int
    prompt: str
    wanted: str
    answers: dict[WayName, str] = {}
    scores: dict[WayName, float] = {}
    weight: float = Field(default=1.0, description="1, or the tokens that a perplexity is a mean over.")
    chances: dict[WayName, list[float]] = Field(default={}, description="Probability of each of `classes`.")


class Proof(_Said):
    """The whole of it."""

    metric: MetricName
    why: str = Field(description="Why this metric.")
    higher_is_better: bool = True
    pass_mark: float | None = Field(default=None, description="A row passes from this score on.")
    verdict: Verdict | None = Field(default=None, description="Beside the best of the other ways; null without one.")
    sentence: str = Field(default="", description="The outcome in words.")
    held_out: int = Field(description="Held-out rows that could have been asked.")
    chosen: str = Field(description="Which of them were asked, and why these.")
    examples: int = Field(default=0, description="Most training rows shown in a prompt of the way `examples`.")
    seed: int = Field(default=0, description="Of row choice, bootstrap and permutations.")
    ways: list[Way] = []
    comparisons: list[Comparison] = []
    classes: list[str] = Field(default=[], description="Labels, when the metric is a classification.")
    confusion: dict[WayName, list[list[int]]] = Field(
        default={}, description="[wanted][answered]; the last column counts answers that are no label."
    )
    calibration: dict[WayName, list[Bin]] = {}
    notes: list[str] = []
    seconds: float = Field(default=0.0, description="Wall time of the proof.")
    rows: list[ProofRow] = []

    @property
    def in_shares(self) -> bool:
        """Whether scores are shares of 1, shown in percent, and not nats."""
        return self.metric not in ("perplexity", "preference")

    def way(self, name: WayName) -> Way | None:
        return next((way for way in self.ways if way.name == name), None)
