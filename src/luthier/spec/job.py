"""What was asked of a training run (TrainRequest, "auto" allowed) and what it came to (Settings, only values).

The rules that turn "auto" into numbers live here, as pure functions of counts that the caller measured; docs/
how-training-works.md prints them. Does not know: files, tokenizers, torch.
"""

from __future__ import annotations

import math
import re
from pathlib import PurePath
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from luthier.spec.errors import BadSetting
from luthier.spec.proof import CHOSEN_METRICS, EXAMPLES

Auto = Literal["auto"]
Method = str  # lora | rslora | dora | pissa | full | freeze:N
Overlong = Literal["error", "drop", "truncate"]
Schedule = Literal["cosine", "linear", "constant"]
Precision = Literal["auto", "bfloat16", "float32"]
TrainPrecision = Literal["auto", "bfloat16", "float32", "float16"]
Objective = Literal["supervised", "dpo"]
AUTO_TEMPLATE = "auto"  # of `template`: the model's own, or another where the own one cannot say the data's tools
AUTO_SHARE, MOST_HELD_OUT = 0.1, 500  # of `validation: auto`
QUIET = 128  # learnt tokens of a step from which on its gradient is no longer mostly noise (docs/experiments.md)
AUTO_BETA = 0.1  # of DPO: the value of its paper's experiments
PREFERENCE_RATE = 0.1  # of the supervised rate: an answer's whole log-probability moves at once
METHODS = ("lora", "rslora", "dora", "pissa", "full", "freeze:N")

PositiveInt = Annotated[int, Field(ge=1)]


class TrainRequest(BaseModel):
    """What the user asked for. Every field is an option of `luthier train`; the description is its help text."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str = Field(description="Base model: a catalogue name, a local folder, or a Hub id.")
    data: list[str] = Field(min_length=1, description="Training file(s).")
    validation: str | None = Field(
        default=None,
        description="Held-out file, or the share of distinct prompts to hold out (0.1), or auto: a tenth, at most 500 "
        "rows.",
    )
    proof_data: str | None = Field(
        default=None,
        description="Held-out file that the proof is measured on, when the validation rows served to choose something.",
    )
    metric: str = Field(
        default="auto", description=f"How held-out answers are scored: auto, {', '.join(CHOSEN_METRICS)}."
    )
    proof_rows: Annotated[int, Field(ge=0)] | Auto = Field(
        default="auto",
        description="Held-out rows that base and result answer at the end; auto: as many as a third of the training "
        "time allows; 0: no proof.",
    )
    proof_examples: Annotated[int, Field(ge=0)] = Field(
        default=EXAMPLES, description="Training rows in the prompt when the base is asked with examples; 0: not asked."
    )
    proof_memory: Literal["shared", "run"] = Field(
        default="shared",
        description="Where the answers of a proof are kept: shared by all runs on this machine, or in the run folder.",
    )
    forgetting: Annotated[int, Field(ge=1)] | Literal["auto", "off"] = Field(
        default="auto",
        description="Items of the general probe that base and result are asked at the end; auto: as many as a sixth "
        "of the training time allows, none for short runs; off.",
    )
    keep_general: bool = Field(
        default=False,
        description="Publish the model at the scale that best keeps general ability: its tuning is multiplied by 0.25, "
        "0.5, 0.75 or 1, whichever forgets least and keeps 95% of the gain. Half of the validation rows choose.",
    )
    replay: Annotated[float, Field(ge=0, le=10)] = Field(
        default=0.0,
        description="General rows to mix in against forgetting, as a share of the training rows (0.1), from "
        "--replay-data or rows of our own.",
    )
    replay_data: str | None = Field(
        default=None, description="The file that --replay takes general rows from; default: short chats of our own."
    )
    must_improve: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = Field(
        default=None,
        description="Threshold of the gate: how much better than the base's the score must be shown to be (the lower "
        "end of its 95% interval).",
    )
    max_forgetting: Annotated[float, Field(ge=0, le=1)] | None = Field(
        default=None, description="Threshold of the gate: the most general ability that may be lost (0.05 is 5%)."
    )
    continue_from: str | None = Field(
        default=None, description="Go on from this tuned model's weights: a run, an adapter or a full model of --model."
    )
    objective: Objective = Field(
        default="supervised",
        description="What is learnt: supervised (to give the answers) or dpo (to prefer one answer to another; "
        "preference records).",
    )
    beta: Annotated[float, Field(gt=0, le=2)] | Auto = Field(
        default="auto", description=f"With dpo: how strongly the start holds the model; auto: {AUTO_BETA}."
    )
    method: Method = Field(default="lora", description="Which weights learn: " + ", ".join(METHODS) + ".")
    template: str | None = Field(
        default=None,
        description="Chat template: a built-in name, a .jinja file, or `auto`: chatml for data with tools that the "
        "model's own has no place for; default: the model's own.",
    )
    epochs: PositiveInt | Auto = Field(default="auto", description="Passes over the data.")
    max_steps: PositiveInt | None = Field(default=None, description="Stop after this many optimizer steps.")
    batch_size: PositiveInt | Auto = Field(default="auto", description="Rows per optimizer step.")
    learning_rate: Annotated[float, Field(gt=0, lt=1)] | Auto = Field(default="auto", description="Peak learning rate.")
    learning_rate_multiplier: Annotated[float, Field(gt=0, allow_inf_nan=False)] = Field(
        default=1.0, description="Multiplies the rate, given or auto."
    )
    schedule: Schedule = Field(default="cosine", description="Learning-rate shape after the warm-up.")
    warmup: Annotated[float, Field(ge=0, lt=1)] = Field(default=0.05, description="Share of the steps that warm up.")
    weight_decay: Annotated[float, Field(ge=0, lt=1)] = Field(default=0.0, description="Decoupled (AdamW) decay.")
    max_grad_norm: Annotated[float, Field(gt=0)] = Field(default=1.0, description="Gradient norm is clipped to this.")
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = Field(default=0.0, description="Label smoothing.")
    prompt_loss_weight: Annotated[float, Field(ge=0, le=1)] = Field(
        default=0.0,
        description="Weight of prompt tokens beside 1 for the completion's; prompt/completion rows only, not chats.",
    )
    rank: PositiveInt = Field(default=16, description="LoRA rank.")
    alpha: Annotated[float, Field(gt=0)] | None = Field(default=None, description="LoRA alpha; default: 2 x rank.")
    dropout: Annotated[float, Field(ge=0, lt=1)] = Field(default=0.0, description="LoRA dropout.")
    target_modules: list[str] = Field(
        default_factory=list, description="Module names that get LoRA; default: every linear layer but the head."
    )
    seed: Annotated[int, Field(ge=0, lt=2**31)] | None = Field(
        default=None, description="Reaches adapter init, split, order, dropout. Chosen and recorded when absent."
    )
    max_length: PositiveInt | Auto = Field(default="auto", description="Longest row in tokens.")
    overlong: Overlong = Field(default="error", description="What to do with rows over --max-length.")
    precision: TrainPrecision = Field(
        default="auto",
        description="Weights and activations; masters are always float32. float16: both in float32, large products of "
        "float16 numbers with float32 totals, on processors that have them.",
    )
    micro_tokens: PositiveInt | Auto = Field(default="auto", description="Physical tokens in one forward pass.")
    checkpoint_every: PositiveInt | Literal["epoch"] = Field(
        default="epoch", description="Steps between checkpoints, or `epoch`."
    )
    validate_every: PositiveInt | Literal["epoch"] = Field(
        default="epoch", description="Steps between validations, or `epoch`."
    )
    publish_checkpoints: Annotated[int, Field(ge=0)] = Field(
        default=0, description="Keep the last N checkpoints as models that can be used: RUN/published/step-*."
    )
    classification_n_classes: Annotated[int, Field(ge=2)] | None = Field(
        default=None, description="Measure each validation as a classification; the completions are N classes."
    )
    classification_positive_class: str | None = Field(
        default=None, description="Measure each validation as a choice of two; this completion is the positive one."
    )
    classification_betas: list[Annotated[float, Field(gt=0, allow_inf_nan=False)]] = Field(
        default_factory=list, description="F-beta scores to measure with two classes; default: 1."
    )
    recipe: str | None = Field(default=None, description="Named settings to start from; other options override it.")

    @field_validator("method")
    @classmethod
    def _method(cls, value: str) -> str:
        if value in METHODS[:-1] or re.fullmatch(r"freeze:[1-9]\d*", value):
            return value
        raise ValueError(f"wanted one of {', '.join(METHODS)} (N: how many of the last layers learn)")

    @field_validator("validation")
    @classmethod
    def _validation(cls, value: str | None) -> str | None:
        share = validation_share(value)
        if share is not None and not 0 < share < 1:
            raise ValueError("a share to hold out lies between 0 and 1")
        return value

    @field_validator("metric")
    @classmethod
    def _metric(cls, value: str) -> str:
        if value in ("auto", *CHOSEN_METRICS):
            return value
        raise ValueError(f"wanted auto, {', '.join(CHOSEN_METRICS)}")

    @model_validator(mode="after")
    def _neighbours(self) -> TrainRequest:
        lora_only = {"rank", "alpha", "dropout", "target_modules"} & self.model_fields_set
        asked = {
            name
            for name in lora_only
            if getattr(self, name) != type(self).model_fields[name].get_default(call_default_factory=True)
        }
        if asked and (self.method == "full" or self.method.startswith("freeze")):
            raise ValueError(f"{', '.join(sorted(asked))} means nothing with method {self.method}; leave it out")
        self._classes_agree()
        self._thresholds_can_be_met()
        return self

    @model_validator(mode="after")
    def _fits_objective(self) -> TrainRequest:
        if not self.prefers:
            if self.beta != "auto":
                raise ValueError("beta means nothing with objective supervised; leave it out, or choose dpo")
            return self
        asked = ("replay", "prompt_loss_weight", "classification_n_classes", "classification_positive_class")
        for name in asked:
            if getattr(self, name):
                raise ValueError(f"{name} is for supervised rows, and objective dpo has pairs; leave it out")
        if self.keep_general:
            raise ValueError("keep_general chooses a scale by answers, and objective dpo has pairs; leave it out")
        if self.dropout:
            raise ValueError("with dropout the two answers of a pair would be judged by two models; leave it out")
        if self.metric != "auto":
            raise ValueError("with objective dpo the metric is which answer the model prefers; leave metric out")
        return self

    @model_validator(mode="after")
    def _replay_has_rows(self) -> TrainRequest:
        if self.replay_data and not self.replay:
            raise ValueError("replay_data needs replay: how many general rows to take from it")
        return self

    @model_validator(mode="after")
    def _scales_can_be_chosen(self) -> TrainRequest:
        if self.keep_general and (self.validation is None or self.proof_rows == 0 or self.forgetting == "off"):
            raise ValueError(
                "keep_general chooses by validation rows and the forgetting meter: give --validation, and neither "
                "--proof-rows 0 nor --forgetting off"
            )
        if self.keep_general and self.method == "dora":
            raise ValueError("keep_general cannot scale dora, whose magnitudes learn too")
        return self

    def _thresholds_can_be_met(self) -> None:
        held = self.validation is not None or self.proof_data is not None
        if self.must_improve is not None and (not held or self.proof_rows == 0):
            raise ValueError("must_improve is measured on validation rows: give --validation, and not --proof-rows 0")
        if self.max_forgetting is not None and self.forgetting == "off":
            raise ValueError("max_forgetting needs the forgetting meter: leave out --forgetting off")

    def _classes_agree(self) -> None:
        if self.classifies and self.validation is None:
            raise ValueError("classification is measured on validation rows, so --validation is needed")
        if self.classification_positive_class is not None and self.classification_n_classes not in (None, 2):
            raise ValueError("a positive class is one of two, so leave out classification_n_classes or make it 2")
        if self.classification_betas and self.classification_positive_class is None:
            raise ValueError("classification_betas needs classification_positive_class")

    @property
    def classifies(self) -> bool:
        return self.classification_positive_class is not None or self.classification_n_classes is not None

    @property
    def base_name(self) -> str:
        """The base without the folders of this machine, which are nobody's business where results are shown."""
        path = PurePath(self.model)
        return path.name if path.is_absolute() else self.model

    @property
    def prefers(self) -> bool:
        """Whether rows come in pairs of a preferred answer and another."""
        return self.objective == "dpo"

    @property
    def uses_adapter(self) -> bool:
        return self.method in ("lora", "rslora", "dora", "pissa")


class Settings(BaseModel):
    """What a request came to: numbers only. Written to RUN/spec.json beside the hashes that make a run repeatable."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    epochs: int
    batch_size: int
    learning_rate: float
    steps: int
    warmup_steps: int
    seed: int
    max_length: int
    micro_tokens: int
    precision: Literal["bfloat16", "float32", "float16"]
    alpha: float
    beta: float | None = None


def make_request(values: dict[str, Any]) -> TrainRequest:
    """Validate options. Raises BadSetting naming the first wrong option, what was found and what was wanted."""
    try:
        return TrainRequest(**values)
    except ValidationError as error:
        found = {problem["loc"][:1]: problem for problem in reversed(error.errors())}  # a union tells each branch
        first = next(reversed(found.values()))
        name = str(first["loc"][0]) if first["loc"] else None
        wanted = first["msg"].removeprefix("Value error, ")
        more = f" ({len(found)} problems in all)" if len(found) > 1 else ""
        option = f"--{name.replace('_', '-')}: found {first['input']!r}; " if name else ""
        raise BadSetting(f"{option}{wanted}{more}.", param=name, hint="See `luthier train --help`.") from error


def validation_share(value: str | None) -> float | None:
    """The share when `validation` is a number such as "0.1" or `auto`; None when it names a file or is absent."""
    if value == "auto":
        return AUTO_SHARE
    try:
        return float(value) if value is not None else None
    except ValueError:
        return None


def auto_validation_share(rows: int) -> float:
    """A tenth, but about 500 rows at most: the 95% interval of a share of them is at most 9 points wide."""
    return min(AUTO_SHARE, MOST_HELD_OUT / max(1, rows))


def auto_epochs(rows: int, text: bool = False) -> int:
    """3 passes; more for fewer than 100 rows (about 300 row visits, at most 25), fewer past 25,000 row visits.

    The shape follows OpenAI's published rule (reference: cookbook, chat fine-tuning data preparation).
    Plain text gets one pass, or three below 300 rows: repetition there memorises.
    """
    if text:
        return 3 if rows < 300 else 1
    if rows * 3 < 100:
        return min(25, max(1, 100 // max(rows, 1)))
    if rows * 3 > 25_000:
        return max(1, 25_000 // rows)
    return 3


def auto_batch_size(rows: int) -> int:
    """About 1/80 of the rows, as a power of two between 4 and 32: enough steps to learn, few enough to average."""
    if rows <= 4:
        return max(1, rows)
    return int(2 ** min(5, max(2, round(math.log2(rows / 80)))))


def auto_learning_rate(hidden_size: int, adapter: bool, learnt: float, prefers: bool = False) -> float:
    """5e-5 x (10 with an adapter) x (2000 / hidden size) ^ 0.78 x min(1, sqrt(learnt / QUIET)), two significant digits;
    `learnt`: tokens that a step learns on average. Preferences (dpo) are learnt at PREFERENCE_RATE of that.

    Sources: Schulman et al., "LoRA Without Regret" (Thinking Machines, 2025), its fit for Llama-like models and the
    factor 10 between adapter and full tuning; Malladi et al., "On the SDEs and Scaling Rules for Adaptive Gradient
    Algorithms" (2022): where a step's gradient is mostly noise, the rate follows the square root of what it averages.
    """
    rate = 5e-5 * (10 if adapter else 1) * (2000 / hidden_size) ** 0.78 * (PREFERENCE_RATE if prefers else 1)
    return float(f"{rate * min(1.0, math.sqrt(max(1.0, learnt) / QUIET)):.1e}")


def auto_max_length(context: int) -> int:
    """The model's context, but at most 2,048 tokens: what one forward pass holds in a laptop's memory."""
    return min(context, 2048)


def learning_rate_at(step: int, settings: Settings, schedule: Schedule) -> float:
    """Rate of optimizer step `step` (0-based): linear warm-up, then the shape down to zero after the last step."""
    if step < settings.warmup_steps:
        return settings.learning_rate * (step + 1) / settings.warmup_steps
    if schedule == "constant":
        return settings.learning_rate
    left = (settings.steps - step) / max(1, settings.steps - settings.warmup_steps)
    shape = left if schedule == "linear" else 0.5 * (1 - math.cos(math.pi * left))
    return settings.learning_rate * shape


RECIPES: dict[str, dict[str, Any]] = {
    # The LoRA chapter of datawhalechina/self-llm (Apache-2.0), its flaws fixed: one end marker instead of two, BOS
    # the same in training and use, a validation split by distinct prompt, the base measured beside the result.
    "self-llm": {
        "method": "lora",
        "rank": 8,
        "alpha": 32.0,
        "dropout": 0.1,
        "learning_rate": 1e-4,
        "epochs": 3,
        "batch_size": 16,
        "max_length": 384,
        "overlong": "truncate",
        "schedule": "linear",
        "warmup": 0.0,
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "seed": 42,
        "validation": "0.05",
    },
}


def apply_recipe(values: dict[str, Any]) -> dict[str, Any]:
    """Options over the recipe they name. Raises BadSetting for an unknown recipe."""
    name = values.get("recipe")
    if name is None:
        return values
    if name not in RECIPES:
        raise BadSetting(
            f"--recipe: found {name!r}; wanted one of {', '.join(sorted(RECIPES))}.",
            param="recipe",
            hint="See docs/how-training-works.md.",
        )
    return {**RECIPES[name], **values}
