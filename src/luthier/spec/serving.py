"""What the door asks of a replica and what a replica answers: one JSON object a line, over the replica's stdin and
stdout. A replica is a process with one base model in memory and any number of adapters over it.

    to the replica     {"do": "generate", ...Ask}   {"do": "cancel", "id": ID}   {"do": "stats", "id": ID}
                       {"do": "ping"}, at any time
    from the replica   {"ready": true, ...}  once the base is loaded, then  {"id": ID, ...}  parts of answers
                       {"alive": true}  to a ping, also while the base is being loaded

Tokens only: rendering, text, stop strings and tool calls are the door's, through the same Renderer that trained.
Does not know: HTTP, torch, chat templates.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Finish = Literal["stop", "length", "cancelled", "error"]


class Ask(BaseModel):
    """One sequence to generate. `n` choices are n Asks, whose shared prompt the prefix cache computes once."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: str
    adapter: str | None = None  # absolute folder of the adapter; None: the base itself
    digest: str | None = None  # sha256 of the adapter's content: caches and batches know it by this, never by a name
    prompt: list[int] = Field(min_length=1)
    max_tokens: int = Field(ge=0)  # 0: only the prompt's log-probabilities
    stop_ids: list[int] = []
    temperature: float = 1.0  # 0: greedy
    top_p: float = 1.0
    seed: int = 0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: dict[int, float] = {}
    logprobs: int | None = None  # alternatives to report beside each chosen token; None: no log-probabilities
    prompt_logprobs: bool = False  # the prompt's too (echo); its first token has none
    grammar: dict[str, Any] | None = None  # {"json_schema": {...}} | {"json_object": true} | {"lark": "..."}


class Token(BaseModel):
    """One token with its log-probability under the model, before temperature, penalties and grammar."""

    model_config = ConfigDict(frozen=True)

    id: int
    logprob: float | None = None
    top: list[tuple[int, float]] = []


class Part(BaseModel):
    """A piece of the answer to Ask `id`. The last one carries `finish`.

    A stop id that ended the sequence is not among the tokens; it is counted in `generated`, as the reference counts.
    """

    model_config = ConfigDict(frozen=True)

    id: str
    tokens: list[Token] = []
    prompt: list[Token] = []
    cached: int = 0  # tokens of the prompt that were not computed again
    generated: int = 0  # tokens sampled so far, a closing stop id included
    finish: Finish | None = None
    error: dict[str, str | None] | None = None  # code, message, param, hint: LuthierError.as_dict()
