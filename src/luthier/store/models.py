"""Tuned models by name: where they lie, what they were made from, and which projects may use a checkpoint.

A name is data, never part of a path. A folder is stored relative to home and must lie inside it, so that a data folder
that several machines mount in different places means the same on each.
Does not know: base models (the engine's catalogue); what is in a folder; how a name is composed.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import Connection, Row, delete, insert, select

from luthier.spec.errors import UserError
from luthier.store.db import Database, Order, Page, check_id, missing, new_id
from luthier.store.tables import alias_moves, models, permissions


@dataclass(frozen=True, slots=True)
class Model:
    """One result that can be asked for by name. `folder` is absolute; `step` is set on a checkpoint, else None."""

    name: str
    base: str
    folder: Path
    content_hash: str
    created_at: int
    owner: str | None
    job_id: str | None
    step: int | None


@dataclass(frozen=True, slots=True)
class Permission:
    """Project `project_id` may use model (or checkpoint) `model`."""

    id: str
    model: str
    project_id: str
    created_at: int


def check_model_name(name: str) -> str:
    """`name` when it can be a tuned model's; raises UserError: no path, nothing unprintable, at most 256 characters."""
    if re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._:@+/-]{0,255}", name) and not {".", "..", ""} & set(name.split("/")):
        return name
    raise UserError(
        f"model: found {name[:80]!a}, wanted letters, digits and . _ : @ + / - (no folder up).", param="model"
    )


def _permission(row: Row[tuple[object, ...]]) -> Permission:
    return Permission(**{name: getattr(row, name) for name in Permission.__slots__})


class Models:
    """The registry of one database."""

    def __init__(self, database: Database) -> None:
        self.database = database

    def register(
        self,
        name: str,
        *,
        base: str,
        folder: Path,
        content_hash: str,
        owner: str | None = None,
        job_id: str | None = None,
        step: int | None = None,
    ) -> Model:
        """Enter a model. Again with the same content and job: the same row, so a worker may repeat itself.

        Raises UserError for a name that cannot be one or is another model's, or a folder outside home.
        """
        check_model_name(name)
        inside = self.database.inside(folder)
        with self.database.transaction() as connection:
            self.database.lock(connection, f"model {name}")
            there = self._find(connection, name)
            if there is not None:
                if (there.content_hash, there.job_id, there.step) == (content_hash, job_id, step):
                    return there
                raise UserError(f"A model with the name {name} is already there.", param="model")
            connection.execute(
                insert(models).values(
                    name=name,
                    base=base,
                    folder=inside,
                    content_hash=content_hash,
                    created_at=self.database.now(),
                    owner=owner,
                    job_id=job_id,
                    step=step,
                )
            )
        return self.get(name)

    def get(self, name: str) -> Model:
        """Raises NotFound, whatever the name looks like."""
        with self.database.reading() as connection:
            return self._get(connection, name)

    def list(self, *, job_id: str | None = None) -> tuple[Model, ...]:
        """Every model, or those of one job (its checkpoints too), oldest first."""
        rows = select(models).order_by(models.c.number)
        if job_id is not None:
            rows = rows.where(models.c.job_id == check_id(job_id, "ftjob-", "ft-", what="fine-tuning job"))
        with self.database.reading() as connection:
            return tuple(self._made(row) for row in connection.execute(rows))

    def delete(self, name: str) -> Model:
        """Strike it from the registry, with its permissions; the folder is the caller's. Raises NotFound; UserError for
        a model that an alias means."""
        with self.database.transaction() as connection:
            self.database.lock(connection, f"model {name}")
            model = self._get(connection, name)
            if used := self._alias_of(connection, name):
                raise UserError(f"{name} is what the alias {used} means; move that first.", param="model")
            connection.execute(delete(models).where(models.c.name == name))
        return model

    def permit(self, name: str, project_ids: Sequence[str]) -> tuple[Permission, ...]:
        """A permission for each project, those that were there already included. Raises NotFound, UserError."""
        for project_id in project_ids:
            if not re.fullmatch("[A-Za-z0-9_-]{1,64}", project_id):
                raise UserError(f"project_ids: found {project_id[:80]!a}, wanted ids.", param="project_ids")
        with self.database.transaction() as connection:
            self.database.lock(connection, f"model {name}")
            self._get(connection, name)
            mine = select(permissions).where(permissions.c.model == name)
            there = {row.project_id: _permission(row) for row in connection.execute(mine)}
            for project_id in dict.fromkeys(project_ids):
                if project_id not in there:
                    made = Permission(new_id("cp_"), name, project_id, self.database.now())
                    values = {field: getattr(made, field) for field in Permission.__slots__}
                    connection.execute(insert(permissions).values(values))
                    there[project_id] = made
            return tuple(there[project_id] for project_id in dict.fromkeys(project_ids))

    def permissions(
        self,
        name: str,
        *,
        project_id: str | None = None,
        after: str | None = None,
        limit: int = 10,
        order: Order = "desc",
    ) -> Page[Permission]:
        """Raises NotFound for the model or the cursor."""
        rows = select(permissions)
        if project_id is not None:
            rows = rows.where(permissions.c.project_id == project_id)
        with self.database.reading() as connection:
            self._get(connection, name)
            return self.database.page(
                connection,
                rows,
                permissions.c.number,
                _permission,
                id_column=permissions.c.id,
                after=after,
                limit=limit,
                order=order,
                within=permissions.c.model == name,
            )

    def forbid(self, name: str, permission_id: str) -> None:
        """Take one permission back. Raises NotFound."""
        check_id(permission_id, "cp_", what="permission")
        with self.database.transaction() as connection:
            gone = connection.execute(
                delete(permissions)
                .where(permissions.c.id == permission_id, permissions.c.model == name)
                .returning(permissions.c.number)
            ).one_or_none()
            if gone is None:
                raise missing("permission", permission_id)
            self.database.remember_place(connection, permissions, permission_id, gone.number)

    def _alias_of(self, connection: Connection, name: str) -> str | None:
        """An alias whose last move led to the model."""
        later = alias_moves.alias()
        newer = select(later.c.number).where(
            later.c.alias == alias_moves.c.alias, later.c.version > alias_moves.c.version
        )
        mine = select(alias_moves.c.alias).where(alias_moves.c.model == name, ~newer.exists())
        return connection.scalars(mine).first()

    def _find(self, connection: Connection, name: str) -> Model | None:
        row = connection.execute(select(models).where(models.c.name == name)).one_or_none()
        return None if row is None else self._made(row)

    def _get(self, connection: Connection, name: str) -> Model:
        model = self._find(connection, name)
        if model is None:
            raise missing("model", name, "model")
        return model

    def _made(self, row: Row[tuple[object, ...]]) -> Model:
        values = {name: getattr(row, name) for name in Model.__slots__}
        return Model(**{**values, "folder": self.database.home / values["folder"]})
