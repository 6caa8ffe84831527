"""Aliases: names like `my-model@production` that mean a tuned model, and move only through the gate.

A model whose job carried thresholds has a verdict; one that missed them cannot be promoted. Each move is written down
with its number, one after the other, so that it can be taken back and two who move at once cannot overwrite each other.
A rollback takes back the last move that has not been taken back: moves are a stack.
Does not know: what was measured; how thresholds are judged (spec/gate.py).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from sqlalchemy import Connection, Row, delete, insert, select

from luthier.spec.errors import UserError
from luthier.store.db import Database, missing
from luthier.store.models import Model, Models
from luthier.store.tables import alias_moves, gates, models

Kind = Literal["promote", "rollback"]


class GateClosed(UserError):
    """The model missed the thresholds of its job."""

    code = "gate_failed"


class Moved(UserError):
    """Somebody else moved the alias since the asker looked."""

    code = "alias_moved"


@dataclass(frozen=True, slots=True)
class Move:
    """The `version`-th move of `alias`, from 1 on: it meant `model` from then on. `by`: the id of the asker's key."""

    alias: str
    version: int
    kind: Kind
    model: str
    created_at: int
    by: str | None


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether a model may be promoted, and if not, why."""

    passed: bool
    reasons: list[str]


def check_alias(name: str) -> str:
    """`name` when it can be an alias; raises UserError."""
    if re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}@[A-Za-z0-9][A-Za-z0-9._-]{0,63}", name):
        return name
    raise UserError(
        f"alias: found {name[:80]!a}, wanted NAME@LABEL of letters, digits and . _ - (my-model@production).",
        param="alias",
    )


class Aliases:
    """The aliases of one database."""

    def __init__(self, database: Database) -> None:
        self.database, self.models = database, Models(database)

    # -- the gate ----------------------------------------------------------------------------------------------------

    def judge(self, model: str, verdict: Verdict) -> None:
        """Write down what the gate says of a model; again: the newest counts. Raises NotFound."""
        with self.database.transaction() as connection:
            self.database.lock(connection, f"model {model}")
            if connection.scalar(select(models.c.number).where(models.c.name == model)) is None:
                raise missing("model", model, "model")
            connection.execute(delete(gates).where(gates.c.model == model))
            row = {"model": model, "passed": int(verdict.passed), "reasons": verdict.reasons}
            connection.execute(insert(gates).values(**row, created_at=self.database.now()))

    def verdict(self, model: str) -> Verdict | None:
        """None for a model whose job carried no thresholds."""
        with self.database.reading() as connection:
            return self._verdict(connection, model)

    # -- moves -------------------------------------------------------------------------------------------------------

    def promote(self, alias: str, model: str, *, by: str | None = None, if_version: int | None = None) -> Move:
        """Let `alias` mean `model`. `if_version`: only if that is the number of its last move (0: it has none yet).
        It means `model` already: the last move is returned.

        Raises UserError for a name that cannot be one and for checkpoints, NotFound, GateClosed, Moved.
        """
        check_alias(alias)
        with self.database.transaction() as connection:
            moves = self._held(connection, alias, if_version)
            self.database.lock(connection, f"model {model}")  # else it could be deleted before this is written
            row = connection.execute(select(models).where(models.c.name == model)).one_or_none()
            if row is None:
                raise missing("model", model, "model")
            if row.step is not None:
                raise UserError(f"{model} is a checkpoint; wanted the model of a finished job.", param="model")
            verdict = self._verdict(connection, model)
            if verdict is not None and not verdict.passed:
                raise GateClosed(f"{model} is not promoted: {' '.join(verdict.reasons)}", param="model")
            if moves and moves[-1].model == model:
                return moves[-1]
            return self._move(connection, alias, moves, "promote", model, by)

    def rollback(self, alias: str, *, by: str | None = None, if_version: int | None = None) -> Move:
        """Take back the last move that was not taken back. Models that were deleted since are passed over.

        Raises NotFound for an alias that is not there, UserError when there is nothing to go back to, Moved.
        """
        with self.database.transaction() as connection:
            moves = self._held(connection, alias, if_version)
            if not moves:
                raise missing("alias", alias, "alias")
            before = _stack(moves)[:-1]
            for model in reversed(before):
                if model == moves[-1].model:
                    continue
                self.database.lock(connection, f"model {model}")
                if connection.scalar(select(models.c.number).where(models.c.name == model)) is not None:
                    return self._move(connection, alias, moves, "rollback", model, by)
            raise UserError(f"There is no model that {alias} meant before and that is still there.", param="alias")

    def remove(self, alias: str) -> None:
        """Strike the alias and its history. Raises NotFound."""
        with self.database.transaction() as connection:
            if not self._held(connection, alias, None):
                raise missing("alias", alias, "alias")
            connection.execute(delete(alias_moves).where(alias_moves.c.alias == alias))

    # -- looking -----------------------------------------------------------------------------------------------------

    def resolve(self, name: str) -> Model:
        """The tuned model that `name` is, or means now. Raises NotFound, whatever the name looks like."""
        if "@" in name:
            with self.database.reading() as connection:
                moves = self._moves(connection, name)
            if moves:
                return self.models.get(moves[-1].model)
        return self.models.get(name)

    def history(self, alias: str) -> tuple[Move, ...]:
        """Its moves, oldest first. Raises NotFound."""
        with self.database.reading() as connection:
            moves = self._moves(connection, alias)
        if not moves:
            raise missing("alias", alias, "alias")
        return moves

    def list(self) -> tuple[Move, ...]:
        """The last move of each alias, by name."""
        newest: dict[str, Move] = {}
        with self.database.reading() as connection:
            for row in connection.execute(select(alias_moves).order_by(alias_moves.c.version)):
                newest[row.alias] = _made(row)
        return tuple(newest[alias] for alias in sorted(newest))

    # -- within a transaction ----------------------------------------------------------------------------------------

    def _held(self, connection: Connection, alias: str, if_version: int | None) -> tuple[Move, ...]:
        """The moves of an alias that nobody else moves until this transaction ends. Raises Moved."""
        self.database.lock(connection, f"alias {alias}")
        moves = self._moves(connection, alias)
        if if_version is not None and if_version != len(moves):
            raise Moved(f"{alias} was moved: its version is {len(moves)}, not {if_version}.", param="if_version")
        return moves

    def _moves(self, connection: Connection, alias: str) -> tuple[Move, ...]:
        rows = select(alias_moves).where(alias_moves.c.alias == alias).order_by(alias_moves.c.version)
        return tuple(_made(row) for row in connection.execute(rows))

    def _move(
        self, connection: Connection, alias: str, moves: tuple[Move, ...], kind: Kind, model: str, by: str | None
    ) -> Move:
        made = Move(alias, len(moves) + 1, kind, model, self.database.now(), by)
        connection.execute(insert(alias_moves).values({name: getattr(made, name) for name in Move.__slots__}))
        return made

    def _verdict(self, connection: Connection, model: str) -> Verdict | None:
        row = connection.execute(select(gates).where(gates.c.model == model)).one_or_none()
        return None if row is None else Verdict(bool(row.passed), row.reasons)


def _stack(moves: tuple[Move, ...]) -> list[str]:
    """The models that were promoted and not taken back; the last is what the alias means."""
    stack: list[str] = []
    for move in moves:
        if move.kind == "promote":
            stack.append(move.model)
        else:  # back to where that model lay, those above it being taken back
            while stack and stack[-1] != move.model:
                stack.pop()
    return stack


def _made(row: Row[tuple[object, ...]]) -> Move:
    return Move(**{name: getattr(row, name) for name in Move.__slots__})
