"""The words of /chat/completions: what a client may ask, field by field, and what its messages come to.

Does not know: models, tokens, how an answer is made.
"""

from __future__ import annotations

import json
from typing import Annotated, Any

from pydantic import Field

from luthier.api import inference
from luthier.api.errors import ApiError
from luthier.api.inference import Kept, Sampling, refuse
from luthier.api.tools import Toolbox, toolbox
from luthier.data.messages import Findings, read_messages
from luthier.data.strict_json import JsonFault, parse_json
from luthier.spec.data import Message

MOST_ALTERNATIVES = 20

FIELDS: dict[str, tuple[str, str]] = {
    **inference.SAMPLING_FIELDS,
    "messages": (
        "supported",
        "Text or text parts; images, sound and files are refused by name, and what the model's template cannot say.",
    ),
    "max_completion_tokens": ("supported", "Default and upper bound: the rest of the context."),
    "max_tokens": ("supported", "The older name; another value beside max_completion_tokens is refused."),
    "logprobs": ("supported", "Of the model itself, before temperature, penalties and grammar."),
    "top_logprobs": ("supported", "0 to 20, with logprobs."),
    "response_format": ("supported", "text, json_object, json_schema: the answer is held to it by a grammar."),
    "tools": (
        "supported",
        "Functions; `custom` is refused. A template without a place for tools gets them as words of the system turn.",
    ),
    "tool_choice": ("supported", "none, auto, required, a function, allowed_tools; what must come comes by a grammar."),
    "parallel_tool_calls": ("supported", "false: at most one call. At most 4 are forced."),
    "functions": ("supported", "The older name of tools; answered with function_call."),
    "function_call": ("supported", "none, auto, or a name."),
    "store": ("supported", ""),
    "metadata": ("supported", "16 pairs. Kept with stored completions."),
    "modalities": ("supported", "`text` only; sound is refused."),
    "safety_identifier": ("ignored", "Keys tell users apart."),
    "prompt_cache_key": ("ignored", "Prefixes are found by their content."),
    "prompt_cache_options": ("ignored", "Prefixes are found by their content."),
    "prompt_cache_retention": ("ignored", "Prefixes are kept while there is memory."),
    "service_tier": ("ignored", "There is one tier; answers say `default`."),
    "reasoning_effort": ("ignored", "The models have no such dial."),
    "verbosity": ("ignored", "The models have no such dial; say it in a message."),
    "audio": ("refused", "the models of this server write text only."),
    "prediction": ("refused", "predicted outputs are not offered."),
    "web_search_options": ("refused", "this server does not search the web."),
    "moderation": ("refused", "this server does not moderate."),
    "any other": ("ignored", "Clients may know more than this server."),
}


class ChatRequest(Sampling, Kept):
    messages: Annotated[list[Any], Field(min_length=1, max_length=100_000)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_ALTERNATIVES)] | None = None
    response_format: Any = None
    tools: list[Any] | None = None
    tool_choice: Any = None
    parallel_tool_calls: bool | None = None
    functions: Annotated[list[Any], Field(min_length=1)] | None = None
    function_call: Any = None
    modalities: list[str] | None = None
    reasoning_effort: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    service_tier: str | None = None
    verbosity: str | None = None
    audio: Any = None
    prediction: Any = None
    web_search_options: Any = None
    moderation: Any = None

    def check(self) -> None:
        """What the fields cannot say each for itself. Raises ApiError 400."""
        refuse(self.model_dump(include={"audio", "prediction", "web_search_options", "moderation"}), FIELDS)
        self.check_stream()
        if self.modalities and set(self.modalities) != {"text"}:
            raise ApiError(400, "modalities: the models of this server write text only.", param="modalities")
        if self.top_logprobs is not None and not self.logprobs:
            raise ApiError(400, "'top_logprobs' needs 'logprobs' to be true.", param="top_logprobs")
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise ApiError(
                400,
                "max_completion_tokens: found another value than in 'max_tokens', its older name. Give one.",
                param="max_completion_tokens",
            )

    @property
    def most_tokens(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def alternatives(self) -> int | None:
        """Log-probabilities to report beside each token's own; None: none at all."""
        return (self.top_logprobs or 0) if self.logprobs else None

    def toolbox(self) -> Toolbox:
        """Raises ApiError 400."""
        return toolbox(
            self.tools or None, self.tool_choice, self.parallel_tool_calls, self.functions, self.function_call
        )

    def form(self) -> dict[str, Any] | None:
        """The JSON Schema that the answer must follow. Raises ApiError 400."""
        asked = self.response_format
        if asked is None:
            return None
        kind = asked.get("type") if isinstance(asked, dict) else None
        if kind == "text":
            return None
        if kind == "json_object":
            return {"type": "object"}
        if kind != "json_schema":
            raise ApiError(
                400, "response_format.type: wanted text, json_object or json_schema.", param="response_format.type"
            )
        holder = asked.get("json_schema")
        name = holder.get("name") if isinstance(holder, dict) else None
        if not isinstance(holder, dict) or not isinstance(name, str) or not name:
            at = "response_format.json_schema" + (".name" if isinstance(holder, dict) else "")
            raise ApiError(400, f"Missing required parameter: '{at}'.", param=at, code="missing_required_parameter")
        schema = holder.get("schema")
        if schema is not None and not isinstance(schema, dict):
            at = "response_format.json_schema.schema"
            raise ApiError(400, f"{at}: wanted a JSON Schema, an object.", param=at)
        return schema or {"type": "object"}

    def turns(self) -> list[Message]:
        """The messages by the rules that training files are held to. Raises ApiError 400 naming the field."""
        findings = Findings("", 0, 0)
        turns = read_messages([_plain(one, n) for n, one in enumerate(self.messages)], "messages", findings)
        for problem in findings.problems:
            if problem.severity == "error":
                hint = f" {problem.hint}" if problem.hint and "trains" not in problem.hint else ""
                raise ApiError(
                    400, f"{problem.field}: found {problem.found}, wanted {problem.wanted}.{hint}", param=problem.field
                )
        return turns


_KEYS = {"role", "content", "name", "tool_calls", "tool_call_id", "function_call", "refusal"}


def _plain(message: Any, number: int) -> Any:
    """A message without keys that say nothing here. Raises ApiError 400 for a part that is no text."""
    if not isinstance(message, dict):
        return message
    plain = {key: value for key, value in message.items() if key in _KEYS and value is not None}
    if "content" in message:
        plain.setdefault("content", None)
    if not plain.get("name", "-"):
        del plain["name"]
    content = plain.get("content")
    if isinstance(content, list):
        plain["content"] = [_part(part, f"messages[{number}].content[{n}]") for n, part in enumerate(content)]
    if isinstance(plain.get("refusal"), str) and content:
        del plain["refusal"]
    calls = plain.get("tool_calls")
    if isinstance(calls, list):
        if calls:
            plain["tool_calls"] = [_call(call) for call in calls]
        else:
            del plain["tool_calls"]
    if isinstance(plain.get("function_call"), dict):
        plain["function_call"] = _function(plain["function_call"])
    return plain


def _part(part: Any, at: str) -> Any:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "refusal" and isinstance(part.get("refusal"), str):
        return {"type": "text", "text": part["refusal"]}
    if kind == "text":
        return {"type": "text", "text": part.get("text")}
    if isinstance(kind, str):
        raise ApiError(
            400, f"{at}.type: found {ascii(kind)[:60]}; the models of this server read text only.", param=f"{at}.type"
        )
    return part


def _call(call: Any) -> Any:
    if not isinstance(call, dict):
        return call
    plain = {key: call[key] for key in ("id", "type", "function") if call.get(key) is not None}
    plain["function"] = _function(plain.get("function"))
    return plain


def _function(value: Any) -> Any:
    """A call as the rules of training files want it. A model's own call may have been cut or wrong, and its client
    sends it back as it was: arguments that are no JSON become a JSON string of themselves."""
    if not isinstance(value, dict):
        return value
    plain = {key: value[key] for key in ("name", "arguments") if key in value}
    if isinstance(plain.get("arguments"), str):
        try:
            parse_json(plain["arguments"])
        except JsonFault:
            plain["arguments"] = json.dumps(plain["arguments"]) if plain["arguments"].strip() else "{}"
    return plain
