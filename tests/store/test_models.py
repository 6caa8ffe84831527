"""The registry of models, and permissions on it."""

from __future__ import annotations

from pathlib import Path

import pytest

from luthier.spec.errors import NotFound, UserError
from luthier.store.db import Database
from luthier.store.models import Model, Models
from tests.store.clock import START

NAME = "ft:gpt-4o-mini-2024-07-18:us:custom_suffix:AbCd1234"
JOB = "ftjob-" + "j" * 24


def register(models: Models, name: str = NAME, content_hash: str = "0" * 64, step: int | None = None) -> Model:
    folder = models.database.home / "runs" / "r" / "model"
    return models.register(name, base="b", folder=folder, content_hash=content_hash, job_id=JOB, step=step)


def test_a_model_is_found_by_name(models: Models, database: Database) -> None:
    model = register(models)
    assert model == Model(NAME, "b", database.home / "runs" / "r" / "model", "0" * 64, START, None, JOB, None)
    assert models.get(NAME) == model
    checkpoint = register(models, NAME + ":ckpt-step-3", "1" * 64, step=3)
    other = models.register("curie:ft-us-2026-01-01-00-00-00", base="b", folder=Path("x"), content_hash="2" * 64)
    assert models.list() == (model, checkpoint, other)
    assert models.list(job_id=JOB) == (model, checkpoint)


def test_names_are_unique_and_workers_may_repeat_themselves(models: Models) -> None:
    assert register(models) == register(models)
    with pytest.raises(UserError, match="is already there"):
        register(models, content_hash="1" * 64)
    assert len(models.list()) == 1


def test_deleting(models: Models) -> None:
    model = register(models)
    models.permit(NAME, ["proj_a"])
    assert models.delete(NAME) == model
    for ask in (models.get, models.delete, models.permissions):
        with pytest.raises(NotFound) as caught:
            ask(NAME)
        assert caught.value.param == "model"
    register(models, content_hash="1" * 64)
    assert models.permissions(NAME).data == ()


@pytest.mark.parametrize(
    "name", ["../../../tmp", "/etc/x", "a/../b", "a/./b", "a//b", "", "a\x00b", "a b", "x" * 257, "ft:b\n", "é", ":a"]
)
def test_names_that_walk(models: Models, name: str) -> None:
    with pytest.raises(UserError, match="model: found"):
        register(models, name)
    with pytest.raises(NotFound):
        models.get(name)


def test_a_folder_lies_inside(models: Models, tmp_path: Path) -> None:
    (models.database.home / "link").symlink_to(tmp_path)
    for folder in (tmp_path, models.database.home / "link" / "x", Path("../x")):
        with pytest.raises(UserError, match="is not inside"):
            models.register("m", base="b", folder=folder, content_hash="0" * 64)


def test_permissions(models: Models) -> None:
    register(models)
    first = models.permit(NAME, ["proj_a", "proj_b", "proj_a"])
    assert [permission.project_id for permission in first] == ["proj_a", "proj_b"]
    assert all(permission.id.startswith("cp_") for permission in first)
    again = models.permit(NAME, ["proj_b", "proj_c"])
    assert again[0] == first[1]
    assert models.permissions(NAME).data == (again[1], first[1], first[0])
    assert models.permissions(NAME, project_id="proj_a").data == (first[0],)
    page = models.permissions(NAME, limit=1)
    models.forbid(NAME, page.data[0].id)
    assert models.permissions(NAME, after=page.data[0].id).data == (first[1], first[0])
    with pytest.raises(NotFound):
        models.forbid(NAME, page.data[0].id)
    with pytest.raises(NotFound):
        models.forbid("another", first[0].id)
    with pytest.raises(NotFound):
        models.permit("another", ["proj_a"])
    with pytest.raises(UserError, match="project_ids"):
        models.permit(NAME, ["../x"])
