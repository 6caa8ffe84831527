"""Examples to token ids with loss weights, and generated ids back to messages: one object for training, evaluation,
serving and export, so that what was trained is what is asked.

A conversation is rendered by the model's own template. Serving's prompt for answer k is the template over the messages
before it, with the generation prompt; the training row must begin with exactly that text. So the answer is what follows
it, up to and including the first token that serving stops on. Nothing here asks a template for masks: most have none.

Where a template rewrites history (drops earlier thinking), later prompts are not prefixes of the whole row; then each
answer becomes a row of its own, rendered as it was when it was the last.

Does not know: files, batches, torch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from luthier.data.answer import answer_text, parse_answer
from luthier.data.expressed import lost, without
from luthier.data.template import ChatTemplate, TemplateRefused, choose_template, own_template
from luthier.data.tokenizer import OPEN, IncrementalText, Tokenizer
from luthier.spec.data import Chat, Completion, Example, Message, Problem, Rendered, Text
from luthier.spec.errors import BadSetting, UserError

_PROBE = "Xyzzy"
# The most that a prompt token can weigh: float32's next number below 1. So whoever has the weights of a row can tell
# its answer (1) from its prompt, and accuracy stays that of answers.
_MOST_PROMPT_WEIGHT = 1 - 2.0**-24


class Unrenderable(UserError):
    """A record that the template cannot express. `problem` names its line and field."""

    code = "unrenderable"

    def __init__(self, problem: Problem) -> None:
        super().__init__(str(problem))
        self.problem = problem


@dataclass(frozen=True, slots=True)
class _Marked:
    """A row as text with stand-ins; `weights[n]` belongs to its n-th OPEN. An answer ends with the first end marker.

    `before` is the weight of what comes before the first OPEN.
    """

    text: str
    weights: tuple[float, ...]
    before: float = 0.0


class Renderer:
    """Made by `Renderer.load(folder, template)`. Attributes: tokenizer, template, stop_ids,
    end_token, `lead` and `trail` (what the template itself puts around an answer: a space, or nothing)."""

    def __init__(self, tokenizer: Tokenizer, template: ChatTemplate, prompt_weight: float = 0.0) -> None:
        self.prompt_weight = min(prompt_weight, _MOST_PROMPT_WEIGHT)
        self.tokenizer = tokenizer
        self.template = template
        self._learn_turns()

    @classmethod
    def load(cls, folder: str | Path, template: str | None = None, prompt_weight: float = 0.0) -> Renderer:
        """The renderer of a model folder. Raises NotFound, BadSetting (no such template, or one that cannot train).

        `prompt_weight`: loss weight of the prompt's tokens in prompt/completion rows; of chats, answers alone are
        learnt whatever it is.
        """
        folder = Path(folder)
        tokenizer = Tokenizer(folder)
        own_file = folder / "chat_template.jinja"
        own = own_file.read_text(encoding="utf-8") if own_file.is_file() else tokenizer.config.get("chat_template")
        name, source = choose_template(template, own_template(own, template), tokenizer.has)
        variables = {
            key: value
            for key in ("bos_token", "eos_token", "pad_token", "unk_token")
            if (value := tokenizer._named(key)) is not None
        }
        variables.setdefault("bos_token", "")
        variables.setdefault("eos_token", "")
        return cls(tokenizer, ChatTemplate(source, name, variables), prompt_weight)

    # -- what the template does with turns ----------------------------------------------------------------------

    def _learn_turns(self) -> None:
        """Find out, from a probe conversation, what ends an answer; decides `end_token` and `stop_ids`.

        closed: the template writes a control token after the answer (ChatML's <|im_end|>).
        open:   nothing closes a turn, but the next one opens with a control token: that one ends the answer.
        bare:   no control token at all; the end-of-text token is appended to the last answer of a row.
        """
        user = {"role": "user", "content": "a"}
        probe = [user, {"role": "assistant", "content": _PROBE}]
        try:
            before = self.template.render([user], None, True)
            whole = self.template.render(probe, None, False)
        except TemplateRefused as error:
            raise BadSetting(
                f"The chat template cannot render a user turn with its answer: {error.message}.",
                param="template",
                hint="Choose another with --template.",
            ) from error
        answer = whole[len(before) :]
        if not whole.startswith(before) or _PROBE not in answer:
            raise BadSetting(
                "The chat template renders an answer differently from the prompt it gives for that answer, so what is "
                "trained would never be what is served.",
                param="template",
                hint="Choose another with --template.",
            )
        self.lead, after = answer.split(_PROBE, 1)
        self._tail = after
        self.trail = after[: len(after) - len(after.lstrip())]
        found = self.tokenizer.control.match(after.lstrip())
        self.openers: frozenset[str] = frozenset()
        if found:
            self.turns, self.end_token = "closed", found[0]
        elif not after.strip() and (opener := self._opener(probe, "user")):
            self.turns, self.end_token = "open", opener
            more = (self._opener(probe, role) for role in ("tool", "assistant", "system"))
            self.openers = frozenset([opener, *(text for text in more if text)])
        elif self.tokenizer.eos and not after.strip():
            self.turns, self.end_token, self.trail = (
                "bare",
                self.tokenizer.eos,
                "",
            )  # the tail comes after the end token
        else:
            raise BadSetting(
                "Nothing in the chat template, nor in the tokenizer, tells where an answer ends.",
                param="template",
                hint="Choose another with --template.",
            )
        controls = self.tokenizer.control_ids
        ends = [controls[self.end_token], *(controls[text] for text in sorted(self.openers))]
        eos = [controls[self.tokenizer.eos]] if self.tokenizer.eos else []
        self.stop_ids = tuple(dict.fromkeys([*ends, *self.tokenizer.declared_stops, *eos]))
        stops = set(self.stop_ids)
        self._stop_texts = {text for text, number in controls.items() if number in stops}
        texts = {"closed": self._stop_texts, "open": self.openers, "bare": {self.end_token}}[self.turns]
        self._ends = {self.tokenizer.stand_in_id(text) for text in texts}
        self.lead = self._spoken_lead(probe, whole)

    def _spoken_lead(self, probe: list[dict[str, Any]], whole: str) -> str:
        """The lead as it comes out of the tokenizer, which may have put a space of its own behind a control token."""
        row = self._ids([_Marked(self._mark(probe, None, whole, upto=len(probe))[0], (1.0,))])[0]
        said = self.tokenizer.decode(token for token, weight in zip(row.ids, row.weights, strict=True) if weight)
        return said.split(_PROBE, 1)[0] if _PROBE in said else self.lead

    def _opener(self, probe: list[dict[str, Any]], role: str) -> str | None:
        """The control token with which a turn of `role` opens right after an answer, if it does."""
        turn = {"role": role, "content": "a", "tool_call_id": "a"}
        try:
            whole = self.template.render([*probe, turn], None, False)
        except TemplateRefused:
            return None
        found = self.tokenizer.control.match(whole.split(_PROBE, 1)[-1].lstrip())
        return found[0] if found else None

    # -- prompts: what serving feeds ----------------------------------------------------------------------------

    def prompt(self, messages: Sequence[Message], tools: Sequence[dict[str, Any]] = ()) -> list[int]:
        """Token ids that ask for the next answer. Raises Unrenderable when the template refuses the messages."""
        turns = [self._as_template(message) for message in messages]
        kit = self._break(list(tools)) or None
        try:
            text = self.template.render(turns, kit, True)
        except TemplateRefused as error:
            raise Unrenderable(Problem(0, "messages", error.message, "messages that the template accepts")) from error
        self._check(Chat(tuple(messages), tuple(tools)), text, (), {}, generation=True)
        return self._ids([_Marked(self._mark(turns, kit, text, upto=len(turns))[0], ())])[0].ids

    def completion_prompt(self, prompt: str) -> list[int]:
        """Token ids that ask for the continuation of `prompt`, which stays exactly as it is."""
        return self.tokenizer.with_first(self.tokenizer.plain(prompt))

    def question(self, example: Example) -> tuple[list[int], str] | None:
        """(prompt ids, reference answer) of an example's last learnt answer; None for plain text.

        A chat's reference is what `parse` makes of the ids that training would learn: a model that learnt them to the
        letter must match, however its template writes tool calls or thinking. Raises Unrenderable.
        """
        if isinstance(example, Completion):
            return self.completion_prompt(example.prompt), example.completion
        if isinstance(example, Text):
            return None
        last = max(n for n, message in enumerate(example.messages) if message.role == "assistant" and message.weight)
        prompt = self.prompt(example.messages[:last], example.tools)
        row = self.rows(replace(example, messages=example.messages[: last + 1]))[-1]
        return prompt, answer_text(self.parse(row.ids[len(prompt) :]))

    # -- rows: what training sees -------------------------------------------------------------------------------

    def rows(self, example: Example) -> list[Rendered]:
        """The training rows of one example. Raises Unrenderable."""
        return next(iter(self.render_many([example])))[1]

    def render_many(self, examples: Iterable[Example]) -> Iterator[tuple[Example, list[Rendered]]]:
        """Rows of each example, tokenised a few hundred at a time (the tokenizer works on all cores).

        Raises Unrenderable at the example that cannot be expressed; `try_render` gives Problems instead.
        """
        for example, rows in self.try_render(examples):
            if isinstance(rows, Problem):
                raise Unrenderable(rows)
            yield example, rows

    def try_render(
        self, examples: Iterable[Example], batch: int = 512
    ) -> Iterator[tuple[Example, list[Rendered] | Problem]]:
        waiting: list[tuple[Example, list[_Marked] | Problem]] = []
        for example in examples:
            try:
                waiting.append((example, self._marked(example)))
            except Unrenderable as error:
                waiting.append((example, error.problem))
            if len(waiting) == batch:
                yield from self._flush(waiting)
                waiting = []
        yield from self._flush(waiting)

    def _flush(
        self, waiting: list[tuple[Example, list[_Marked] | Problem]]
    ) -> Iterator[tuple[Example, list[Rendered] | Problem]]:
        marked = [row for _, rows in waiting if not isinstance(rows, Problem) for row in rows]
        done = iter(self._ids(marked))
        for example, rows in waiting:
            if isinstance(rows, Problem):
                yield example, rows
                continue
            rendered = [next(done) for _ in rows]
            for row in rendered:
                row.source, row.line = example.row, example.line
            yield example, rendered

    def _marked(self, example: Example) -> list[_Marked]:
        if isinstance(example, Chat):
            return self._chat(example)
        end = self.tokenizer.stand_ins[self.tokenizer.eos or self.end_token]
        if isinstance(example, Completion):
            return [_Marked(example.prompt + OPEN + example.completion + end, (1.0,), self.prompt_weight)]
        return [_Marked(OPEN + example.text + (end if example.ends else ""), (1.0,))]

    def _chat(self, chat: Chat) -> list[_Marked]:
        turns = [self._as_template(message) for message in chat.messages]
        tools = self._break(list(chat.tools)) or None
        learnt = [n for n, message in enumerate(chat.messages) if message.role == "assistant" and message.weight]
        if not learnt:
            raise self._refuse(chat, "messages", "no assistant turn to learn", "one with weight 1")
        try:
            whole = self.template.render(turns, tools, False)
            marked, seen = self._mark(turns, tools, whole, upto=len(turns))
            if all(n in seen for n in learnt) and self._ends_known(chat, learnt):
                self._check(chat, whole, learnt, seen)
                weights = tuple(float(chat.messages[n].weight) for n in seen)
                return [_Marked(marked, weights)]
            return [self._single(chat, turns[: n + 1], tools, n) for n in learnt]
        except TemplateRefused as error:
            raise self._refuse(
                chat, "messages", error.message, "messages that the template accepts", "Or choose another --template."
            ) from error

    def _ends_known(self, chat: Chat, learnt: list[int]) -> bool:
        """A bare template ends only a row's last answer, so earlier ones must become rows of their own."""
        return self.turns != "bare" or learnt == [len(chat.messages) - 1]

    def _single(
        self, chat: Chat, turns: list[dict[str, Any]], tools: list[dict[str, Any]] | None, last: int
    ) -> _Marked:
        """The row of one answer, rendered as the conversation's last turn."""
        whole = self.template.render(turns, tools, False)
        marked, seen = self._mark(turns, tools, whole, upto=len(turns))
        if last not in seen:
            raise self._refuse(
                chat,
                f"messages[{last}]",
                "an answer that the template renders differently from its own generation prompt",
                "a template whose prompts are prefixes of its rows",
                "Choose another --template.",
            )
        self._check(Chat(chat.messages[: last + 1], chat.tools, chat.line, chat.row), whole, [last], seen)
        return _Marked(marked, tuple(float(n == last) for n in seen))

    def _mark(
        self, turns: list[dict[str, Any]], tools: list[dict[str, Any]] | None, text: str, upto: int
    ) -> tuple[str, dict[int, tuple[int, int]]]:
        """(text with stand-ins, {turn: (start, end) of its answer in `text`}), for every answer whose serving prompt
        is a prefix of `text`. Training rows and serving prompts go through here alike: same borders, same ids."""
        seen: dict[int, tuple[int, int]] = {}
        pieces: list[str] = []
        at = 0
        for n, turn in enumerate(turns[:upto]):
            if turn["role"] != "assistant":
                continue
            try:
                before = self.template.render(turns[:n], tools, True)
            except TemplateRefused:
                continue  # an answer with nothing before it: it can be context, but not be asked for
            if not text.startswith(before) or len(before) < at:
                continue
            start, (end, closing) = len(before), self._end_of_answer(text, len(before))
            if not self._ends_alike(turns[: n + 1], tools, before, text[start:end]):
                continue
            pieces += [self.tokenizer.protect(text[at:start]), OPEN, self.tokenizer.protect(text[start:end])]
            pieces += [self.tokenizer.stand_ins[closing]] if closing else []
            seen[n] = (start, end)
            at = end
        pieces.append(self.tokenizer.protect(text[at:]))
        return "".join(pieces), seen

    def _ends_alike(
        self, turns: list[dict[str, Any]], tools: list[dict[str, Any]] | None, before: str, answer: str
    ) -> bool:
        """Whether this answer reads the same when it is the last turn. If the template closes it only sometimes, the
        search for its end ran on into a later turn, which must never be learnt."""
        try:
            alone = self.template.render(turns, tools, False)
        except TemplateRefused:
            return False
        last = alone[len(before) : self._end_of_answer(alone, len(before))[0]]
        return alone.startswith(before) and (answer == last or (self.turns == "open" and answer.startswith(last)))

    def _end_of_answer(self, text: str, start: int) -> tuple[int, str | None]:
        """(where the answer's last character ends, a token to add there because the template writes none).

        User text cannot fool this search: control tokens spelt in it are broken before rendering.
        """
        ends = self.openers if self.turns == "open" else self._stop_texts
        if self.turns != "bare":
            for found in self.tokenizer.control.finditer(text, start):
                if found[0] in ends:
                    return found.end(), None
        if self.turns == "open":
            return len(text), self.end_token
        return max(start, len(text.removesuffix(self._tail))), self.end_token

    # -- text to ids --------------------------------------------------------------------------------------------

    def _ids(self, marked: Sequence[_Marked]) -> list[Rendered]:
        return [
            self._weigh(twin_ids, row)
            for twin_ids, row in zip(self.tokenizer.encode(_texts(marked)), marked, strict=True)
        ]

    def _weigh(self, twin_ids: list[int], row: _Marked) -> Rendered:
        """Ids and weights grow together, here and nowhere else."""
        ids: list[int] = []
        weights: list[float] = []
        given = iter(row.weights)
        weight = next(given) if row.text.startswith(OPEN) else row.before
        for twin in twin_ids:
            if twin == self.tokenizer.open_id:
                weight = next(given, 0.0)
                continue
            ids.append(self.tokenizer.real(twin))
            weights.append(weight)
            if twin in self._ends:
                weight = 0.0
        whole = self.tokenizer.with_first(ids)
        weights = [0.0] * (len(whole) - len(ids)) + weights
        if weights:
            weights[0] = 0.0  # nothing comes before the first token, so nothing can predict it
        return Rendered(whole, weights)

    def _check(
        self,
        chat: Chat,
        text: str,
        learnt: Sequence[int],
        seen: dict[int, tuple[int, int]],
        generation: bool = False,
    ) -> None:
        answers = {n: text[slice(*seen[n])] for n in learnt}
        if (problem := lost(chat, text, answers, self.tokenizer.break_control)) is not None:
            raise Unrenderable(problem)
        for variant, problem in without(chat):
            turns = [self._as_template(message) for message in variant.messages]
            with contextlib.suppress(TemplateRefused):
                if self.template.render(turns, self._break(list(variant.tools)) or None, generation) == text:
                    raise Unrenderable(problem)

    def _refuse(self, chat: Chat, field: str, found: str, wanted: str, hint: str = "") -> Unrenderable:
        return Unrenderable(Problem(chat.line, field, found, wanted, hint, row=chat.row))

    # -- messages as templates want them ------------------------------------------------------------------------

    def _as_template(self, message: Message) -> dict[str, Any]:
        """OpenAI's shape, arguments decoded; `developer` is this field's newer word for `system`."""
        role = "system" if message.role == "developer" else message.role
        turn: dict[str, Any] = {"role": role, "content": self.tokenizer.break_control(message.content)}
        if message.name is not None:
            turn["name"] = self.tokenizer.break_control(message.name)
        if message.tool_call_id is not None:
            turn["tool_call_id"] = self.tokenizer.break_control(message.tool_call_id)
        if message.tool_calls:
            turn["tool_calls"] = [
                {
                    "id": call.id or f"call_{n}",
                    "type": "function",
                    "function": self._break({"name": call.name, "arguments": call.arguments}),
                }
                for n, call in enumerate(message.tool_calls)
            ]
        return turn

    def _break(self, value: Any) -> Any:
        """Any JSON value with the control tokens in its texts (keys too) broken."""
        if isinstance(value, str):
            return self.tokenizer.break_control(value)
        if isinstance(value, dict):
            return {self._break(key): self._break(item) for key, item in value.items()}
        return [self._break(item) for item in value] if isinstance(value, list | tuple) else value

    # -- ids to messages ----------------------------------------------------------------------------------------

    def answer(self, ids: Sequence[int]) -> str:
        """Text of generated ids up to the first stop token, without what the template itself puts around an answer."""
        stops = set(self.stop_ids)
        end = next((n for n, token in enumerate(ids) if token in stops), len(ids))
        return self.tokenizer.decode(ids[:end]).removeprefix(self.lead).removesuffix(self.trail)

    def parse(self, ids: Sequence[int]) -> Message:
        """The assistant message that generated ids spell: undoes rendering, tool calls included."""
        return parse_answer(self.answer(ids))

    def stream(self) -> IncrementalText:
        return self.tokenizer.stream()


def _texts(marked: Sequence[_Marked]) -> list[str]:
    """What to encode. A text that is learnt from its first character on begins as any text does: with nothing before
    it, so that SentencePiece sees its start."""
    return [row.text.removeprefix(OPEN) for row in marked]
