"""Functions that a model may call: what a request says of them, how a prompt tells of them, the grammar of calls that
must come, and calls found in an answer.

One form of a call, the one that data/templates/chatml.jinja writes and data/answer.py reads:
`<tool_call>{"name": ..., "arguments": {...}}</tool_call>`. A template that has no place for tools gets them as words
of the system turn, calls as words of assistant turns and, if it knows no tool turns either, results as user turns.
Does not know: sampling, JSON of answers.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from luthier.api.errors import ApiError
from luthier.data.answer import parse_answer
from luthier.data.messages import Findings, read_tools
from luthier.data.render import Renderer, Unrenderable
from luthier.spec.data import Message
from luthier.store.db import new_id

OPENING = "<tool_call>"
MOST_TOOLS = 128
MOST_CALLS = 4  # that a grammar lets follow each other: a small model that must call may never want to stop
Mode = Literal["none", "auto", "required"]
# Words that chatml.jinja puts before the tools.
LEADING = 'You can call these functions. Answer with one <tool_call>{"name": ..., "arguments": {...}}</tool_call> '
LEADING += "for each call."
# Whitespace inside JSON that a grammar forces: enough for what people write, too little to go on for ever in.
SPACES = {"whitespace_pattern": "[ \\t]?|\\n[ \\t]{0,32}"}


@dataclass(frozen=True, slots=True)
class Toolbox:
    """The tools of a request. `tools` are shown to the model as they were given; `names` are those it may call now."""

    tools: tuple[dict[str, Any], ...] = ()
    names: tuple[str, ...] = ()
    mode: Mode = "none"
    single: bool = False
    legacy: bool = False  # asked with `functions`: answered with `function_call`

    @property
    def listens(self) -> bool:
        """Whether calls are looked for in the answer."""
        return self.mode != "none" and bool(self.tools)

    @property
    def forced(self) -> bool:
        return self.mode == "required"


def toolbox(tools: Any, choice: Any, parallel: bool | None, functions: Any, function_call: Any) -> Toolbox:
    """Raises ApiError 400 naming the field."""
    if functions is not None and tools is not None:
        raise ApiError(400, "'functions' and 'tools' are two names of one thing: give one.", param="functions")
    legacy = functions is not None or (tools is None and function_call is not None)
    param = "functions" if legacy else "tools"
    given = _read(functions if legacy else tools, param)
    known = [str(tool["function"]["name"]) for tool in given]
    if len(set(known)) < len(known):
        raise ApiError(400, f"{param}: two functions have one name.", param=param)
    if legacy:
        mode, names, single = _call_choice(function_call, known)
    else:
        if function_call is not None:
            raise ApiError(400, "'function_call' goes with 'functions'.", param="function_call")
        mode, names, single = _choice(choice, known)
    return Toolbox(given, names, mode, single or legacy or parallel is False, legacy)


def _read(value: Any, param: str) -> tuple[dict[str, Any], ...]:
    if value is None:
        return ()
    if isinstance(value, list):
        if len(value) > MOST_TOOLS:
            raise ApiError(400, f"{param}: found {len(value)}, wanted at most {MOST_TOOLS}.", param=param)
        for number, tool in enumerate(value):
            kind = tool.get("type") if isinstance(tool, dict) else None
            if param == "tools" and kind not in (None, "function"):
                raise ApiError(
                    400,
                    f"tools[{number}].type: found {ascii(kind)[:40]}; this server has function tools only.",
                    param=f"tools[{number}].type",
                )
    findings = Findings("", 0, 0)
    made = read_tools(value, param, findings, bare=param == "functions")
    if findings.failed:
        problem = findings.problems[0]
        raise ApiError(400, f"{problem.field}: found {problem.found}, wanted {problem.wanted}.", param=problem.field)
    for number, tool in enumerate(made):
        name = tool["function"]["name"]
        if not re.fullmatch("[A-Za-z0-9_.:-]{1,64}", name):
            at = f"{param}[{number}].function.name" if param == "tools" else f"functions[{number}].name"
            raise ApiError(400, f"{at}: wanted up to 64 letters, digits and _ - . :", param=at)
    return made


def _choice(choice: Any, known: Sequence[str]) -> tuple[Mode, tuple[str, ...], bool]:
    if choice is None:
        return ("auto" if known else "none"), tuple(known), False
    if choice == "none" or (choice == "auto" and not known):
        return "none", (), False
    if not known:
        raise ApiError(400, "'tool_choice' is only allowed when 'tools' are specified.", param="tool_choice")
    if choice == "auto":
        return "auto", tuple(known), False
    if choice == "required":
        return "required", tuple(known), False
    kind = choice.get("type") if isinstance(choice, dict) else None
    if kind == "function":
        return "required", (_named(choice, known, "tool_choice"),), True
    allowed = choice.get("allowed_tools") if kind == "allowed_tools" else None
    if isinstance(allowed, dict) and allowed.get("mode") in ("auto", "required"):
        tools = allowed.get("tools")
        if isinstance(tools, list) and tools:
            names = tuple(dict.fromkeys(_named(tool, known, "tool_choice") for tool in tools))
            return ("required" if allowed["mode"] == "required" else "auto"), names, False
    wanted = "none, auto, required, a function of 'tools' by name, or allowed_tools with mode and tools"
    raise ApiError(400, f"tool_choice: wanted {wanted}.", param="tool_choice")


def _call_choice(choice: Any, known: Sequence[str]) -> tuple[Mode, tuple[str, ...], bool]:
    if choice is None or choice == "auto":
        return ("auto" if known else "none"), tuple(known), True
    if choice == "none":
        return "none", (), True
    if isinstance(choice, dict) and known:
        return "required", (_named({"function": choice}, known, "function_call"),), True
    raise ApiError(400, "function_call: wanted none, auto, or the name of one of 'functions'.", param="function_call")


def _named(value: Any, known: Sequence[str], param: str) -> str:
    function = value.get("function") if isinstance(value, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(name, str) or name not in known:
        raise ApiError(400, f"{param}: found the function {ascii(name)[:80]}, which is not offered.", param=param)
    return name


# --- prompts --------------------------------------------------------------------------------------------------------


def prompt_ids(renderer: Renderer, messages: Sequence[Message], tools: Sequence[dict[str, Any]]) -> list[int]:
    """The prompt by the model's own template; if that cannot say the tools and calls, with them in words.

    Raises Unrenderable, of the first try.
    """
    try:
        return renderer.prompt(messages, tools)
    except Unrenderable as refused:
        if not tools and not any(message.tool_calls or message.role == "tool" for message in messages):
            raise
        for results_from in ("tool", "user"):
            try:
                return renderer.prompt(in_words(messages, tools, results_from))
            except Unrenderable:
                continue
        raise refused from None


def in_words(messages: Sequence[Message], tools: Sequence[dict[str, Any]], results_from: str) -> list[Message]:
    """The same conversation without tools and calls beside its words, `results_from` telling results."""
    said = [_in_words(message, results_from) for message in messages]
    if not tools:
        return said
    kit = "\n".join([LEADING, *(json.dumps(tool, ensure_ascii=False) for tool in tools)])
    if said and said[0].role in ("system", "developer"):
        return [replace(said[0], content=f"{said[0].content}\n\n{kit}"), *said[1:]]
    return [Message("system", kit), *said]


def _in_words(message: Message, results_from: str) -> Message:
    if message.role == "tool" and results_from == "user":
        return Message("user", f"<tool_response>{message.content}</tool_response>")
    if not message.tool_calls:
        return message
    calls = [
        f"{OPENING}{json.dumps({'name': call.name, 'arguments': call.arguments}, ensure_ascii=False)}</tool_call>"
        for call in message.tool_calls
    ]
    content = "\n".join([message.content, *calls] if message.content else calls)
    return Message("assistant", content, message.name)


# --- what must come ---------------------------------------------------------------------------------------------------


def grammar(box: Toolbox, schema: dict[str, Any] | None, lead: str) -> dict[str, Any] | None:
    """The grammar of an answer: calls when they are required, JSON of `schema` when there is one, either of them when
    calls are allowed beside it. `lead` is what the template writes before an answer."""
    if not box.forced and schema is None:
        return None
    if not box.listens and not lead:
        return {"json_schema": spaced(schema or {})}
    lines = []
    ways = []
    if schema is not None and not box.forced:
        ways.append("body")
        lines.append(f"body: %json {json.dumps(spaced(schema))}")
    if box.listens:
        ways.append("calls")
        more = "" if box.single else f' ("\\n" call){{0,{MOST_CALLS - 1}}}'
        lines.append(f"calls: call{more}")
        lines.append("call: " + " | ".join(f"call_{number}" for number in range(len(box.names))))
        functions = {tool["function"]["name"]: tool["function"] for tool in box.tools}
        for number, name in enumerate(box.names):
            opening = json.dumps(f'{{"name": {json.dumps(name)}, "arguments": ')
            lines.append(f'call_{number}: "{OPENING}" /\\n?/ {opening} arguments_{number} "}}" /\\n?/ "</tool_call>"')
            lines.append(f"arguments_{number}: %json {json.dumps(spaced(_arguments(functions[name])))}")
    before = f"{json.dumps(lead)} " if lead else ""
    return {"lark": "\n".join([f"start: {before}answer", f"answer: {' | '.join(ways)}", *lines]) + "\n"}


def _arguments(function: dict[str, Any]) -> dict[str, Any]:
    """The schema of a function's arguments: an object of what is described, and of nothing else unless it says so."""
    parameters = function.get("parameters") or {}
    if parameters.keys() & {"$ref", "anyOf", "oneOf", "allOf", "patternProperties", "additionalProperties"}:
        return {"type": "object", **parameters}
    return {"type": "object", "properties": {}, **parameters, "additionalProperties": False}


def spaced(schema: dict[str, Any]) -> dict[str, Any]:
    """`schema` with a bound on the white space between its parts."""
    return {**schema, "x-guidance": SPACES}


# --- what came --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Call:
    """A call in an answer; `arguments` is JSON text, cut off where the answer was."""

    name: str
    arguments: str
    id: str = field(default_factory=lambda: new_id("call_"))


class Listener:
    """Separates an answer's content from its calls. Content is released as it comes, up to where a call may begin;
    what follows is read when the answer is whole."""

    def __init__(self, box: Toolbox) -> None:
        self._box = box
        self._held = ""
        self._calling = False

    def push(self, text: str) -> str:
        """Content that can be told now."""
        if not self._box.listens:
            return text
        self._held += text
        if self._calling:
            return ""
        place = self._held.find(OPENING)
        if place >= 0:
            self._calling = True
        else:
            place = len(self._held)
            sizes = range(min(len(OPENING) - 1, place), 0, -1)
            place -= next((size for size in sizes if self._held.endswith(OPENING[:size])), 0)
        place = len(self._held[:place].rstrip())  # content ends before the white space that leads to a call
        content, self._held = self._held[:place], self._held[place:]
        return content

    def end(self) -> tuple[str, list[Call]]:
        """(the rest of the content, the calls). Text that looks like calls and is none is content."""
        held, self._held = self._held, ""
        if not self._calling:
            return held, []
        message = parse_answer(held)
        calls = [Call(call.name, _json(call.arguments)) for call in message.tool_calls]
        if not calls and self._box.forced:
            calls = self._cut(held)
            return ("", calls) if calls else (held, [])
        if not calls or any(call.name not in self._box.names for call in calls):
            return held, []
        if self._box.forced:
            calls += self._cut(held.rpartition("</tool_call>")[2])
        rest = "" if self._box.forced else message.content
        return rest, calls[:1] if self._box.single else calls

    def _cut(self, text: str) -> list[Call]:
        """A forced call that the end of the answer cut."""
        found = re.fullmatch(r'\s*<tool_call>\s*\{"name": "([^"]+)", "arguments": (.*)', text, re.DOTALL)
        return [Call(found[1], found[2])] if found and found[2] else []


def _json(arguments: Any) -> str:
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
