"""Examples to records of each format: the other way of formats.py, and what a format cannot hold, by name.

The law: what is written without a loss reads back as an equal Example.
Does not know: files, tables (sheets.py).
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from typing import Any

from luthier.spec.data import Chat, Completion, Example, Message, Preference, Text, ToolCall

Meaning = Example | Preference
Json = dict[str, Any]


class Unfit(Exception):
    """A record that a format has no form for, whatever one gives up. The text says why."""


class Losses(list[str]):
    """What was given up to fit one record into a format, in a few words each. An empty list: nothing."""

    def add(self, what: str) -> None:
        if what not in self:
            self.append(what)


def encode(meaning: Meaning, target: str) -> tuple[Json, Losses]:
    """The record of `meaning` in the format `target` (a name in TARGETS), and what it gave up.

    Raises Unfit when there is no such record.
    """
    losses = Losses()
    return TARGETS[target](meaning, losses), losses


# -- to and from conversations -----------------------------------------------------------------------------------------


def as_chat(meaning: Meaning, losses: Losses) -> Chat:
    """A conversation that says the same. Raises Unfit for plain text."""
    if isinstance(meaning, Chat):
        return meaning
    if isinstance(meaning, Completion):
        if not meaning.prompt:
            raise Unfit("an empty prompt: a conversation begins with a question")
        return Chat((Message("user", meaning.prompt), Message("assistant", meaning.completion)))
    if isinstance(meaning, Preference):
        losses.add("the answer that is not preferred")
        context = [dataclasses.replace(turn, weight=0) if turn.role == "assistant" else turn for turn in meaning.prompt]
        return Chat((*context, *meaning.preferred), meaning.tools)
    raise Unfit("plain text: it has no question and no answer")


def _without_tools(chat: Chat, losses: Losses) -> Chat:
    """The conversation for formats of texts alone; calls cannot be left out without leaving their answers behind."""
    if any(turn.tool_calls or turn.role == "tool" for turn in chat.messages):
        raise Unfit("tool calls or their results")
    if chat.tools:
        losses.add("tools")
    return chat


def _plain_turns(chat: Chat, losses: Losses) -> list[Message]:
    """Turns of formats that have no names, no weights and no developer; each is given up on its own."""
    turns = []
    for turn in chat.messages:
        if turn.name is not None:
            losses.add("names of speakers")
        if turn.role == "developer":
            losses.add("developer messages, written as system messages")
            turn = dataclasses.replace(turn, role="system")
        turns.append(turn)
    return turns


# -- OpenAI chat -------------------------------------------------------------------------------------------------------


def _chat(meaning: Meaning, losses: Losses) -> Json:
    chat = as_chat(meaning, losses)
    record: Json = {"messages": [message(turn) for turn in chat.messages]}
    if chat.tools:
        record["tools"] = list(chat.tools)
    return record


def message(turn: Message) -> Json:
    """A turn as OpenAI writes it; a tool's answer to a call without an id is the older `function` message."""
    made: Json = {"role": turn.role, "content": turn.content}
    if turn.role == "tool" and turn.tool_call_id is None:
        made["role"] = "function"
    if turn.name is not None:
        made["name"] = turn.name
    if turn.tool_calls:
        made["content"] = turn.content or None
        made["tool_calls"] = [_call(call) for call in turn.tool_calls]
    if turn.tool_call_id is not None:
        made["tool_call_id"] = turn.tool_call_id
    if turn.role == "assistant" and turn.weight == 0:
        made["weight"] = 0
    return made


def _call(call: ToolCall) -> Json:
    function = {"name": call.name, "arguments": json.dumps(call.arguments, ensure_ascii=False)}
    named = {} if call.id is None else {"id": call.id}
    return {**named, "type": "function", "function": function}


# -- preference --------------------------------------------------------------------------------------------------------


def _preference(suffix: str) -> Callable[[Meaning, Losses], Json]:
    def made(meaning: Meaning, losses: Losses) -> Json:
        del losses
        if not isinstance(meaning, Preference):
            raise Unfit("one answer: a preference needs a second one that is worse")
        asked: Json = {"messages": [message(turn) for turn in meaning.prompt]}
        if meaning.tools:
            asked["tools"] = list(meaning.tools)
        return {
            "input": asked,
            f"preferred_{suffix}": [message(turn) for turn in meaning.preferred],
            f"non_preferred_{suffix}": [message(turn) for turn in meaning.rejected],
        }

    return made


# -- texts -------------------------------------------------------------------------------------------------------------


def _completion(meaning: Meaning, losses: Losses) -> Json:
    if isinstance(meaning, Completion):
        return {"prompt": meaning.prompt, "completion": meaning.completion}
    if isinstance(meaning, Text):
        return {"prompt": "", "completion": meaning.text}
    turns = _one_exchange(meaning, losses)
    return {"prompt": turns[0].content, "completion": turns[1].content}


def _one_exchange(meaning: Meaning, losses: Losses) -> list[Message]:
    turns = _plain_turns(_without_tools(as_chat(meaning, losses), losses), losses)
    if any(turn.role == "system" for turn in turns):
        losses.add("system messages")
        turns = [turn for turn in turns if turn.role != "system"]
    if [turn.role for turn in turns] != ["user", "assistant"]:
        raise Unfit(f"{len(turns)} turns ({_roles(turns)}): a prompt has one completion")
    if not turns[0].content or not turns[1].content:
        raise Unfit("an empty question or answer")
    return turns


def _roles(turns: Sequence[Message]) -> str:
    return ", ".join(turn.role for turn in turns[:6]) + (", ..." if len(turns) > 6 else "")


def _text(meaning: Meaning, losses: Losses) -> Json:
    if isinstance(meaning, Completion):
        if meaning.prompt:
            losses.add("where the prompt ends and what is learnt begins")
        return {"text": meaning.prompt + meaning.completion}
    if isinstance(meaning, Text):
        return {"text": meaning.text}
    raise Unfit("a conversation: plain text has no turns (a chat template writes them, when training)")


# -- Alpaca ------------------------------------------------------------------------------------------------------------


def _alpaca(meaning: Meaning, losses: Losses) -> Json:
    turns = _plain_turns(_without_tools(as_chat(meaning, losses), losses), losses)
    record: Json = {}
    if turns and turns[0].role == "system":
        if not turns[0].content:
            losses.add("an empty system message")
        record["system"] = turns[0].content
        turns = turns[1:]
    asked, answers = turns[::2], turns[1::2]
    if len(turns) % 2 or {turn.role for turn in asked} != {"user"} or {turn.role for turn in answers} != {"assistant"}:
        raise Unfit(f"turns in the order {_roles(turns)}: Alpaca has questions and answers in turn")
    if not asked[-1].content or not answers[-1].content:
        raise Unfit("an empty question or answer in the last turn")
    if any(turn.weight == 0 for turn in answers):
        losses.add("weight 0: every answer of Alpaca is learnt")
    record |= {"instruction": asked[-1].content, "input": "", "output": answers[-1].content}
    if len(asked) > 1:
        earlier = zip(asked[:-1], answers[:-1], strict=True)
        record["history"] = [[question.content, answer.content] for question, answer in earlier]
    return record


# -- ShareGPT ----------------------------------------------------------------------------------------------------------

_SPEAKERS = {"system": "system", "user": "human", "assistant": "gpt", "tool": "observation"}


def _sharegpt(meaning: Meaning, losses: Losses) -> Json:
    chat = as_chat(meaning, losses)
    turns: list[Json] = []
    calls = 0
    waiting: list[str | None] = []
    for turn in _plain_turns(chat, losses):
        if turn.tool_calls:
            _check_calls(turn, calls, losses)
            calls += len(turn.tool_calls)
            waiting += [call.id for call in turn.tool_calls]
            turns.append(_with_weight({"from": "function_call", "value": _calls(turn.tool_calls)}, turn))
            continue
        if turn.role == "tool":
            _check_result(turn, waiting, losses)
        elif turn.role == "user":
            waiting.clear()
        turns.append(_with_weight({"from": _SPEAKERS[turn.role], "value": turn.content}, turn))
    record: Json = {"conversations": turns}
    if chat.tools:
        record["tools"] = json.dumps(list(chat.tools), ensure_ascii=False)
    return record


def _with_weight(made: Json, turn: Message) -> Json:
    return {**made, "weight": 0} if turn.role == "assistant" and turn.weight == 0 else made


def _calls(calls: Sequence[ToolCall]) -> str:
    made = [{"name": call.name, "arguments": _arguments(call.arguments)} for call in calls]
    return json.dumps(made[0] if len(made) == 1 else made, ensure_ascii=False)


def _arguments(value: Any) -> Any:
    """An object as it is; anything else as JSON text, which is how a reader takes it for what it was."""
    return value if isinstance(value, dict) else json.dumps(value, ensure_ascii=False)


def _check_calls(turn: Message, before: int, losses: Losses) -> None:
    if turn.content:
        losses.add("words beside tool calls")
    if [call.id for call in turn.tool_calls] != [f"call_{before + n}" for n in range(len(turn.tool_calls))]:
        losses.add("ids of tool calls, which are numbered anew")


def _check_result(turn: Message, waiting: list[str | None], losses: Losses) -> None:
    """Results answer open calls in order there; one that answers another call would be mistaken for this one."""
    if not waiting:
        if turn.tool_call_id != "call_0":
            losses.add("ids of tool calls, which are numbered anew")
        return
    if turn.tool_call_id is not None and turn.tool_call_id != waiting[0] and turn.tool_call_id in waiting:
        raise Unfit("tool results in another order than their calls")
    expected = waiting.pop(0)
    if turn.tool_call_id != expected:
        losses.add("ids of tool calls, which are numbered anew")


TARGETS: dict[str, Callable[[Meaning, Losses], Json]] = {
    "chat": _chat,
    "preference": _preference("output"),
    "preference-completion": _preference("completion"),
    "completion": _completion,
    "alpaca": _alpaca,
    "sharegpt": _sharegpt,
    "text": _text,
}
