"""The words of /chat/completions: its request, and what a request becomes before a model is asked.

Tools reach the model through its template. A template that would leave them out gets them spelled into the system
turn instead, in the form that our own chatml template uses, so that the answer is parsed the same way.
Does not know: HTTP, replicas.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from luthier.api.errors import ApiError
from luthier.api.jobs_wire import Metadata
from luthier.data.messages import Findings, read_messages, read_tools
from luthier.data.render import Renderer, Unrenderable
from luthier.spec.data import Message

OPEN, CLOSE = "<tool_call>", "</tool_call>"
TIGHT = {"x-guidance": {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}}

TABLE: dict[str, tuple[str, str]] = {
    "messages": ("supported", "Text of every role, text parts, tool calls and results. Images, audio, files: 400."),
    "model": ("supported", "A base, an alias, a tuned model or a checkpoint."),
    "stream": ("supported", "Comments keep an idle stream open."),
    "stream_options": ("supported", "include_usage. include_obfuscation changes nothing."),
    "n": ("supported", "1 to 128; the prompt is computed and counted once."),
    "temperature": ("supported", "0 to 2; 0 is greedy and repeats."),
    "top_p": ("supported", "0 to 1."),
    "seed": ("supported", "The same seed gives the same answer, whatever else is asked meanwhile."),
    "max_tokens": ("supported", "The older word for max_completion_tokens; two different values: 400."),
    "max_completion_tokens": ("supported", "Default: the rest of the model's context."),
    "stop": ("supported", "A string or up to 4; found over token borders, never sent."),
    "presence_penalty": ("supported", "-2 to 2."),
    "frequency_penalty": ("supported", "-2 to 2."),
    "logit_bias": ("supported", "Token id to -100 .. 100, ids of this model's tokenizer."),
    "logprobs": ("supported", "Of the model itself, before temperature, penalties and grammar."),
    "top_logprobs": ("supported", "0 to 20, with logprobs."),
    "response_format": ("supported", "text, json_object, json_schema; kept to by a grammar, token by token."),
    "tools": ("supported", "Functions. Custom tools: 400."),
    "tool_choice": ("supported", "none, auto, required, one function, allowed_tools."),
    "parallel_tool_calls": ("supported", "false keeps the first call; a forced call is always one."),
    "functions": ("supported", "The older word for tools."),
    "function_call": ("supported", "The older word for tool_choice."),
    "store": ("supported", "Keeps request and answer; see the stored completions."),
    "metadata": ("supported", "16 pairs; kept with a stored completion."),
    "user": ("ignored", "Kept with a stored completion."),
    "safety_identifier": ("ignored", "There is no abuse monitoring on your own machine."),
    "prompt_cache_key": ("ignored", "The prefix cache goes by content."),
    "prompt_cache_retention": ("ignored", "The prefix cache goes by content."),
    "prompt_cache_options": ("ignored", "The prefix cache goes by content."),
    "service_tier": ("ignored", "There is one tier."),
    "reasoning_effort": ("ignored", "The bases here do not reason apart."),
    "verbosity": ("ignored", "Say it in the prompt."),
    "moderation": ("ignored", "There is none."),
    "modalities": ("refused", 'Only text; ["text"] passes.'),
    "audio": ("refused", "Text only."),
    "prediction": ("refused", "Not offered."),
    "web_search_options": ("refused", "The server reaches no web."),
}
_REFUSED = ("audio", "prediction", "web_search_options")


def _stops(value: Any) -> Any:
    """A string, or up to 4; none of them empty."""
    if value is None:
        return []
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or len(stops) > 4 or not all(isinstance(one, str) and one for one in stops):
        raise ValueError("wanted a string or up to 4 strings, none of them empty")
    return stops


Stops = Annotated[list[str], BeforeValidator(_stops), Field(default_factory=list)]
Bias = Annotated[dict[int, Annotated[float, Field(ge=-100, le=100)]], Field(max_length=1024)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
Seed = Annotated[int, Field(ge=-(2**63), lt=2**63)]


class StreamOptions(BaseModel):
    include_usage: bool | None = None


class JsonSchema(BaseModel):
    name: Annotated[str, Field(min_length=1, max_length=64)]
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")
    strict: bool | None = None


class ResponseFormat(BaseModel):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class ChatRequest(BaseModel):
    model_config = ConfigDict(extra="allow")

    model: Annotated[str, Field(min_length=1, max_length=256)]
    messages: Annotated[list[dict[str, Any]], Field(min_length=1, max_length=4096)]
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    seed: Seed | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    stop: Stops
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: Bias | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    response_format: ResponseFormat | None = None
    tools: Annotated[list[dict[str, Any]], Field(max_length=128)] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    functions: Annotated[list[dict[str, Any]], Field(max_length=128)] | None = None
    function_call: str | dict[str, Any] | None = None
    store: bool | None = None
    metadata: Metadata | None = None
    user: str | None = None


def refuse(asked: ChatRequest) -> None:
    """What cannot be honoured. Raises ApiError 400 naming it."""
    given = asked.model_extra or {}
    for name in _REFUSED:
        if given.get(name) is not None:
            raise ApiError(400, f"{name}: {TABLE[name][1]}", param=name)
    if given.get("modalities") not in (None, ["text"]):
        raise ApiError(400, f'modalities: found {given["modalities"]!r:.80}, wanted ["text"].', param="modalities")
    if asked.top_logprobs is not None and not asked.logprobs:
        raise ApiError(400, "top_logprobs: wants logprobs true beside it.", param="top_logprobs")
    if None not in (asked.max_tokens, asked.max_completion_tokens) and asked.max_tokens != asked.max_completion_tokens:
        raise ApiError(400, "max_tokens and max_completion_tokens differ; give one.", param="max_tokens")


def read_turns(asked: ChatRequest) -> list[Message]:
    """The messages, by the rules of training files. Raises ApiError 400 naming the first wrong field."""
    findings = Findings("", 0, 0)
    turns = [{key: value for key, value in turn.items() if _said(key, value)} for turn in asked.messages]
    messages = read_messages(turns, "messages", findings)
    _raise(findings)
    return messages


def _said(key: str, value: Any) -> bool:
    """Whether a key says something: answers given back to us carry empty ones."""
    return key == "content" or not (value is None or (key in ("annotations", "audio", "parsed") and not value))


def _raise(findings: Findings) -> None:
    for problem in findings.problems:
        if problem.severity == "error":
            message = f"{problem.field}: found {problem.found}, wanted {problem.wanted}. {problem.hint}".rstrip()
            raise ApiError(400, message, param=problem.field)


class Kit:
    """The tools of one request: those on offer, and the one that must be called, if any."""

    def __init__(self, asked: ChatRequest) -> None:
        self.legacy = asked.functions is not None and asked.tools is None
        field = "functions" if self.legacy else "tools"
        findings = Findings("", 0, 0)
        given = asked.functions if self.legacy else asked.tools
        self.tools = read_tools(given, field, findings, bare=self.legacy)
        _raise(findings)
        choice = asked.function_call if self.legacy else asked.tool_choice
        self.param = "function_call" if self.legacy else "tool_choice"
        self.forced: list[dict[str, Any]] = []
        self._choose(choice)

    def _choose(self, choice: Any) -> None:
        if isinstance(choice, dict) and choice.get("type") == "allowed_tools":
            allowed = choice.get("allowed_tools")
            if not isinstance(allowed, dict) or not isinstance(allowed.get("tools"), list):
                raise ApiError(400, "tool_choice: wanted allowed_tools with mode and tools.", param=self.param)
            self.tools = tuple(self._named(_function_name(one)) for one in allowed["tools"])
            choice = allowed.get("mode", "auto")
        if isinstance(choice, dict):
            self.forced = [self._named(choice.get("name") if self.legacy else _function_name(choice))]
        elif choice == "required" and not self.legacy:
            if not self.tools:
                raise ApiError(400, "tool_choice required: there are no tools.", param=self.param)
            self.forced = list(self.tools)
        elif choice == "none":
            self.tools = ()
        elif choice not in (None, "auto"):
            raise ApiError(
                400, f"{self.param}: found {choice!r:.80}, wanted none, auto, required or a function.", param=self.param
            )

    def _named(self, name: Any) -> dict[str, Any]:
        for tool in self.tools:
            if tool["function"]["name"] == name:
                return tool
        raise ApiError(400, f"{self.param}: no tool has the name {str(name)[:80]!r}.", param=self.param)

    def grammar(self) -> dict[str, Any] | None:
        """One call of a forced tool, as the template writes it."""
        if not self.forced:
            return None
        calls = [
            {
                "type": "object",
                "properties": {
                    "name": {"const": tool["function"]["name"]},
                    "arguments": tool["function"].get("parameters") or {"type": "object"},
                },
                "required": ["name", "arguments"],
                "additionalProperties": False,
            }
            for tool in self.forced
        ]
        definitions: dict[str, Any] = {}
        for call in calls:  # references of a schema point at its root, which is ours now
            for key in ("$defs", "definitions"):
                definitions.setdefault(key, {}).update(call["properties"]["arguments"].get(key) or {})
        schema = {**(calls[0] if len(calls) == 1 else {"anyOf": calls}), **{k: v for k, v in definitions.items() if v}}
        text = json.dumps({**schema, **TIGHT})
        return {"lark": f'start: "{OPEN}" call "{CLOSE}"\ncall: %json {text}\n'}


def _function_name(choice: Any) -> Any:
    function = choice.get("function") if isinstance(choice, dict) else None
    return function.get("name") if isinstance(function, dict) else None


def format_grammar(asked: ChatRequest) -> dict[str, Any] | None:
    """The grammar of `response_format`. Raises ApiError 400."""
    form = asked.response_format
    if form is None or form.type == "text":
        return None
    if form.type == "json_object":
        return {"json_schema": {"type": "object", **TIGHT}}
    if form.json_schema is None:
        raise ApiError(400, "response_format.json_schema: wanted name and schema.", param="response_format")
    return {"json_schema": {**(form.json_schema.schema_ or {"type": "object"}), **TIGHT}}


def prompt(renderer: Renderer, messages: list[Message], kit: Kit) -> list[int]:
    """The ids that training would have put before the answer. Raises ApiError 400 when the template refuses."""
    try:
        return renderer.prompt(messages, kit.tools)
    except Unrenderable as error:
        if not kit.tools and not any(turn.tool_calls for turn in messages):
            raise _refused(error) from error
    try:
        return renderer.prompt(_spelled(messages, kit), ())
    except Unrenderable as error:
        raise _refused(error) from error


def _refused(error: Unrenderable) -> ApiError:
    return ApiError(400, f"The model's chat template cannot write these messages: {error}", param="messages")


def _spelled(messages: list[Message], kit: Kit) -> list[Message]:
    """The same conversation with tools and calls as text."""
    turns = [
        Message(
            turn.role,
            "\n".join(
                [
                    *([turn.content] if turn.content else []),
                    *(
                        OPEN + json.dumps({"name": c.name, "arguments": c.arguments}, ensure_ascii=False) + CLOSE
                        for c in turn.tool_calls
                    ),
                ]
            ),
            turn.name,
            (),
            turn.tool_call_id,
        )
        for turn in messages
    ]
    if not kit.tools:
        return turns
    offer = "\n".join(
        [
            'You can call these functions. Answer with one <tool_call>{"name": ..., "arguments": {...}}</tool_call> '
            "for each call.",
            *(json.dumps(tool, ensure_ascii=False) for tool in kit.tools),
        ]
    )
    if turns[0].role in ("system", "developer"):
        return [Message("system", f"{turns[0].content}\n\n{offer}"), *turns[1:]]
    return [Message("system", offer), *turns]
