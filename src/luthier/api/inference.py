"""What chat completions and completions are asked alike: the fields of sampling, their ranges, the Asks they make.

Null is the same as absent. Unknown fields are ignored, as OpenAI's clients send new ones before servers know them.
Does not know: messages, prompts, answers.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema

from luthier.api.errors import ApiError
from luthier.api.jobs_wire import Metadata
from luthier.api.voices import Voice
from luthier.spec.serving import Ask
from luthier.store.db import new_id

MOST_CHOICES = 128
MOST_STOPS = 4
LARGEST_BIAS = 100.0
GOLDEN = 0x9E3779B97F4A7C15  # odd, so that the seeds of choices of one request never meet


def _stops(value: Any) -> Any:
    """A string or up to 4 of them -> a list, with one sentence for the whole field."""
    stops = [value] if isinstance(value, str) else value
    if stops is None:
        return None
    if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
        raise ValueError("wanted a string, or a list of up to 4 strings")
    if len(stops) > MOST_STOPS:
        raise ValueError(f"found {len(stops)} strings, wanted at most {MOST_STOPS}")
    if "" in stops:
        raise ValueError("found an empty string, which would stop everything")
    return stops


def _bias(value: Any) -> Any:
    """{"TOKEN ID": bias} with whole numbers for ids."""
    if value is None:
        return None
    if not isinstance(value, dict):
        raise ValueError("wanted an object of token ids and numbers")
    made = {}
    for key, bias in value.items():
        if not (isinstance(key, str) and key.isascii() and key.isdigit() and len(key) <= 9):
            raise ValueError(f"found the key {ascii(key)[:40]}, wanted token ids")
        if isinstance(bias, bool) or not isinstance(bias, int | float) or not -LARGEST_BIAS <= bias <= LARGEST_BIAS:
            raise ValueError(f"found {ascii(bias)[:40]} for {key}, wanted a number from -100 to 100")
        made[int(key)] = float(bias)
    return made


STOP_SCHEMA = WithJsonSchema(
    {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}, "maxItems": 4}, {"type": "null"}]}
)
BIAS_SCHEMA = WithJsonSchema(
    {"anyOf": [{"type": "object", "additionalProperties": {"type": "number"}}, {"type": "null"}]}
)
Stops = Annotated[list[str] | None, BeforeValidator(_stops), STOP_SCHEMA]
Bias = Annotated[dict[int, float] | None, BeforeValidator(_bias), BIAS_SCHEMA]


class StreamOptions(BaseModel):
    model_config = ConfigDict(strict=True)

    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class Sampling(BaseModel):
    """The fields that both have."""

    model_config = ConfigDict(strict=True, frozen=True)

    model: Annotated[str, Field(min_length=1, max_length=512)]
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Stops = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: Bias = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None

    @property
    def choices(self) -> int:
        return self.n or 1

    @property
    def stops(self) -> Sequence[str]:
        return self.stop or ()

    @property
    def with_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    def check_stream(self) -> None:
        if self.stream_options is not None and not self.stream:
            raise ApiError(
                400, "The 'stream_options' parameter is only allowed when 'stream' is on.", param="stream_options"
            )


class Kept(BaseModel):
    """The fields of stored completions."""

    store: bool | None = None
    metadata: Metadata | None = None


def asks(
    asked: Sampling,
    voice: Voice,
    prompt: Sequence[int],
    count: int,
    *,
    max_tokens: int,
    first: int = 0,
    **more: Any,
) -> list[Ask]:
    """`count` Asks that differ in their seeds; `first` numbers them among those of one request."""
    seed = secrets.randbelow(2**63) if asked.seed is None else asked.seed
    return [
        Ask(
            id=new_id("ask-"),
            adapter=None if voice.adapter is None else str(voice.adapter),
            digest=None if voice.adapter is None else voice.content,
            prompt=list(prompt),
            max_tokens=max_tokens,
            stop_ids=list(voice.spoken.renderer.stop_ids),
            temperature=1.0 if asked.temperature is None else asked.temperature,
            top_p=1.0 if asked.top_p is None else asked.top_p,
            seed=(seed + number * GOLDEN) % 2**63,
            frequency_penalty=asked.frequency_penalty or 0.0,
            presence_penalty=asked.presence_penalty or 0.0,
            logit_bias=asked.logit_bias or {},
            **more,
        )
        for number in range(first, first + count)
    ]


def room(voice: Voice, prompt: Sequence[int], wanted: int | None, param: str) -> int:
    """Tokens that the answer may have: what is wanted, or the rest of the context when that is less.

    Raises ApiError 400 when the prompt leaves no room.
    """
    left = voice.context - len(prompt)
    if left < (1 if wanted is None else min(1, wanted)):
        raise too_long(voice, len(prompt), param)
    return left if wanted is None else min(wanted, left)


def too_long(voice: Voice, tokens: int, param: str) -> ApiError:
    """`tokens` is the size of the prompt, or the least that it can be."""
    return ApiError(
        400,
        f"This model's maximum context length is {voice.context} tokens. However, your {param} resulted in at least "
        f"{tokens} tokens. Please reduce the length of the {param}.",
        param=param,
        code="context_length_exceeded",
    )


def usage(prompt: int, generated: int, cached: int) -> dict[str, Any]:
    """`prompt` counts every prompt once, `generated` the tokens of every choice."""
    return {
        "prompt_tokens": prompt,
        "completion_tokens": generated,
        "total_tokens": prompt + generated,
        "prompt_tokens_details": {"cached_tokens": cached, "audio_tokens": 0},
        "completion_tokens_details": {
            "reasoning_tokens": 0,
            "audio_tokens": 0,
            "accepted_prediction_tokens": 0,
            "rejected_prediction_tokens": 0,
        },
    }


def refuse(fields: Mapping[str, Any], table: Mapping[str, tuple[str, str]]) -> None:
    """Raise ApiError 400 for the first of `fields` that is given and that `table` refuses."""
    for name, value in fields.items():
        if value is not None and table.get(name, ("", ""))[0] == "refused":
            raise ApiError(
                400, f"'{name}' is not supported here: {table[name][1]}", param=name, code="unsupported_parameter"
            )


# Rows of the tables of fields that both have.
SAMPLING_FIELDS: dict[str, tuple[str, str]] = {
    "model": ("supported", "A base, an alias, a tuned model or a checkpoint."),
    "n": ("supported", "1 to 128."),
    "temperature": ("supported", "0 to 2, default 1; 0 is greedy and repeatable."),
    "top_p": ("supported", "0 to 1, default 1."),
    "seed": ("supported", "The same request with the same seed gives the same answer on the same machine."),
    "stop": ("supported", "A string or up to 4, not empty. Found across token borders; the earliest ends the answer."),
    "frequency_penalty": ("supported", "-2 to 2."),
    "presence_penalty": ("supported", "-2 to 2."),
    "logit_bias": ("supported", "-100 to 100 a token id of the model asked; -100 forbids in practice, 100 forces."),
    "stream": ("supported", ""),
    "stream_options": ("supported", "`include_usage`; `include_obfuscation` is ignored: nothing is padded."),
    "user": ("ignored", "Kept with stored completions."),
}
