"""Who gets the next tokens: sequences join between steps, a step computes all of them together, the done ones leave.

Slots are filled without a hole: those that decode first, then at most one whose prompt is still being read. Prompts
are read in pieces, so that running answers do not stall. When keys and values outgrow their budget, the youngest
sequence goes back in line with what it has said so far.
Does not know: pipes, files, how a model computes.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from luthier.serve.compute import Compute
from luthier.serve.decoder import Piece
from luthier.serve.grammar import Matcher
from luthier.serve.lora import Adapter
from luthier.serve.memory import BLOCK, block_keys
from luthier.serve.sampling import Chooser, choose, described
from luthier.spec.errors import Broken, LuthierError, UserError
from luthier.spec.serving import Ask, Finish, Part, Token

PROMPT_TOKENS = 1024  # of prompts read in a step when nobody decodes
BESIDE_TOKENS = 256  # and beside others that decode: how long they wait at most
LOGITS_ROWS = 64  # of a prompt's log-probabilities at once: a row is a whole vocabulary


class TooLong(UserError):
    code = "context_length_exceeded"


@dataclass(eq=False, slots=True)
class Running:
    """A sequence. `tokens` are prompt and answer, the first `computed` of them lie in its slot."""

    ask: Ask
    adapter: Adapter | None
    chooser: Chooser
    room: int  # tokens it may generate
    number: int
    tokens: list[int]
    computed: int = 0
    cached: int | None = None
    generated: int = 0
    prompt: list[Token] = field(default_factory=list)

    @property
    def owner(self) -> str:
        return self.adapter.key if self.adapter else ""

    @property
    def waits(self) -> bool:
        """Whether more than one token has to be computed before the next can be chosen."""
        return self.computed < len(self.tokens) - 1

    def first_key(self) -> bytes | None:
        return next(block_keys(self.owner, self.tokens[: min(BLOCK, len(self.tokens) - 1)]), None)


class Scheduler:
    """Everything about the asks at hand. `emit` gets their parts, in order."""

    def __init__(self, compute: Compute, context: int, kv_tokens: int, rows: int, emit: Callable[[Part], None]) -> None:
        self.compute, self.context, self.kv_tokens, self.most = compute, context, kv_tokens, rows
        self.emit = emit
        self.rows: list[Running] = []
        self.waiting: deque[Running] = deque()
        self.steps = 0
        self._numbers = itertools.count()

    @property
    def busy(self) -> bool:
        return bool(self.rows or self.waiting)

    def add(self, ask: Ask, adapter: Adapter | None = None, matcher: Matcher | None = None) -> None:
        """Put `ask` in line. Raises UserError for one that can never be answered."""
        self.check(ask)
        room = min(ask.max_tokens, self.context - len(ask.prompt))
        if len(ask.prompt) + room > self.kv_tokens:
            raise UserError(
                f"Prompt and answer come to {len(ask.prompt) + room:,} tokens; this server holds {self.kv_tokens:,}.",
                param="max_tokens",
            )
        chooser = Chooser(ask, matcher)
        self.waiting.append(Running(ask, adapter, chooser, room, next(self._numbers), list(ask.prompt)))

    def check(self, ask: Ask) -> None:
        """Raises UserError unless the model can read the ask."""
        if len(ask.prompt) + min(1, ask.max_tokens) > self.context:
            raise TooLong(
                f"The prompt has {len(ask.prompt):,} tokens, and the model reads at most {self.context:,}, its answer "
                "included.",
                param="prompt",
            )
        for name, ids in (("prompt", ask.prompt), ("logit_bias", list(ask.logit_bias))):
            if ids and not (min(ids) >= 0 and max(ids) < self.compute.vocabulary):
                raise UserError(f"{name} has a token id beyond 0 to {self.compute.vocabulary - 1}.", param=name)

    @torch.inference_mode()
    def cancel(self, name: str) -> None:
        """Free what `name` holds at once. Unknown: it has ended already."""
        for sequence in list(self.waiting):
            if sequence.ask.id == name:
                self.waiting.remove(sequence)
                self._say(sequence, finish="cancelled")
        for sequence in list(self.rows):
            if sequence.ask.id == name:
                self._release(sequence)
                self._say(sequence, finish="cancelled")

    def fail_all(self, error: LuthierError) -> None:
        """Tell everyone that it cannot go on."""
        for sequence in [*self.rows, *self.waiting]:
            self._say(sequence, finish="error", error=error)
        self.rows.clear()
        self.waiting.clear()
        self.compute.give_back()

    # --- a step -----------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def step(self) -> None:
        """One forward pass: a token for everyone who decodes, some more of the prompts."""
        self._make_way()
        pieces = self._pieces()
        if not pieces:
            return
        self.steps += 1
        rows = list(self.rows)
        adapters = [row.adapter for row in rows]
        states = self.compute.states(pieces, adapters)
        last, at = [], 0
        for row, piece in zip(rows, pieces, strict=True):
            if row.ask.prompt_logprobs:
                self._read_prompt(row, piece, states[at : at + len(piece.tokens)])
            at += len(piece.tokens)
            last.append(at - 1)
            row.computed = piece.end
        ready = [place for place, row in enumerate(rows) if row.computed == len(row.tokens)]
        if ready:
            index = torch.tensor([last[place] for place in ready])
            logits = self.compute.logits(states[index], [adapters[place] for place in ready])
            self._next([rows[place] for place in ready], logits)
        if not self.rows:
            self.compute.give_back()

    def _make_way(self) -> None:
        """Send the youngest back in line until the others fit."""
        while len(self.rows) > 1 and not self.compute.fits(len(self.rows), self._longest()):
            youngest = max(self.rows, key=lambda row: row.number)
            self._release(youngest)
            youngest.computed = 0
            self.waiting.appendleft(youngest)

    def _longest(self) -> int:
        return max((len(row.tokens) for row in self.rows), default=0)

    def _pieces(self) -> list[Piece]:
        """One for each row, in the order of the slots. Joins as many of those in line as there is room for."""
        pieces = []
        decoding = [row for row in self.rows if not row.waits]
        budget = BESIDE_TOKENS if decoding else PROMPT_TOKENS
        reading = set()
        for slot, row in enumerate(self.rows):
            count = min(len(row.tokens) - row.computed, budget) if row.waits else 1
            budget -= count if row.waits else 0
            if row.waits:
                reading.add(row.first_key())
            pieces.append(Piece(slot, row.computed, row.tokens[row.computed : row.computed + count]))
        whole = not self.rows or pieces[-1].end == len(self.rows[-1].tokens)
        while whole and budget > 0 and self._may_join(reading):
            row = self.waiting.popleft()
            slot = len(self.rows)
            self.rows.append(row)
            self.compute.reserve(slot + 1, self._longest())
            if not row.ask.prompt_logprobs:
                row.computed = self.compute.recall(slot, row.owner, row.tokens[:-1])
            row.cached = row.computed if row.cached is None else row.cached
            count = min(len(row.tokens) - row.computed, budget)
            budget -= count
            pieces.append(Piece(slot, row.computed, row.tokens[row.computed : row.computed + count]))
            reading.add(row.first_key())
            whole = pieces[-1].end == len(row.tokens)
        self.compute.reserve(len(self.rows), self._longest())
        return pieces

    def _may_join(self, reading: set[bytes | None]) -> bool:
        """Whether the next in line may: there is a slot, its tokens fit, and nobody is just computing its prefix."""
        if not self.waiting or len(self.rows) >= self.most:
            return False
        row = self.waiting[0]
        if self.rows and not self.compute.fits(len(self.rows) + 1, max(self._longest(), len(row.tokens)) + 1):
            return False
        key = row.first_key()
        return key is None or key not in reading or row.ask.prompt_logprobs

    def _read_prompt(self, row: Running, piece: Piece, states: Tensor) -> None:
        """Log-probabilities of the prompt's tokens that `piece` predicts."""
        if not row.prompt:
            row.prompt.append(Token(id=row.tokens[0]))
        for place in range(len(row.prompt) - 1, min(piece.end, len(row.ask.prompt) - 1), LOGITS_ROWS):
            end = min(place + LOGITS_ROWS, piece.end, len(row.ask.prompt) - 1)
            some = states[place - piece.start : end - piece.start]
            logits = self.compute.logits(some, [row.adapter] * len(some))
            for offset, line in enumerate(logits, start=place + 1):
                row.prompt.append(described(line, row.tokens[offset], row.ask.logprobs or 0))

    def _next(self, rows: list[Running], logits: Tensor) -> None:
        finite = logits.sum(-1).isfinite()
        if not bool(finite.all()):
            for row, fine in zip(rows, finite.tolist(), strict=True):
                if not fine:
                    self._release(row)
                    self._say(row, finish="error", error=Broken("The model gave values that are not finite."))
            rows = [row for row, fine in zip(rows, finite.tolist(), strict=True) if fine]
            logits = logits[finite]
        for row, token, line in zip(rows, self._choices(rows, logits), logits, strict=True):
            if isinstance(token, LuthierError):
                self._release(row)
                self._say(row, finish="error", error=token)
            else:
                self._take(row, token, line)

    def _choices(self, rows: list[Running], logits: Tensor) -> list[int | LuthierError]:
        if all(row.chooser.plain and row.chooser.greedy for row in rows):
            return list(choose(logits, [row.chooser for row in rows]))
        given: list[int | LuthierError] = []
        for row, line in zip(rows, logits, strict=True):
            try:
                given += choose(line[None], [row.chooser])
            except LuthierError as error:
                given.append(error)
        return given

    def _take(self, row: Running, token: int, logits: Tensor) -> None:
        """`row` goes on with `token`, or ends."""
        if row.generated == 0:
            self.compute.remember(self.rows.index(row), row.owner, row.tokens)
        if row.room == 0:
            self._end(row, [], "length")
            return
        row.generated += 1
        if token in row.ask.stop_ids:
            self._end(row, [], "stop")
            return
        said = [described(logits, token, row.ask.logprobs)]
        row.chooser.chose(token)
        row.tokens.append(token)
        if row.generated == row.room:
            self._end(row, said, "length")
            return
        self._say(row, said)

    def _end(self, row: Running, said: list[Token], finish: Finish) -> None:
        self.compute.remember(self.rows.index(row), row.owner, row.tokens[: row.computed])
        self._release(row)
        self._say(row, said, finish)

    def _say(
        self,
        row: Running,
        said: list[Token] | None = None,
        finish: Finish | None = None,
        error: LuthierError | None = None,
    ) -> None:
        prompt, row.prompt = row.prompt, []
        self.emit(
            Part(
                id=row.ask.id,
                tokens=said or [],
                prompt=prompt if row.generated <= 1 else [],
                cached=row.cached or 0,
                generated=row.generated,
                finish=finish,
                error=error.as_dict() if error else None,
            )
        )

    def _release(self, gone: Running) -> None:
        """Take `gone` out and close the hole: the last that decodes moves there, then the one that still reads."""
        hole = self.rows.index(gone)
        self.compute.clear(hole, gone.computed)
        decoding = [place for place, row in enumerate(self.rows) if not row.waits or place == hole]
        for source in dict.fromkeys((decoding[-1], len(self.rows) - 1)):
            if source > hole:
                row = self.rows[source]
                self.compute.move(source, hole, row.computed)
                self.compute.clear(source, row.computed)
                self.rows[hole], hole = row, source
        self.rows.pop(hole)
