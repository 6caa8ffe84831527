"""Aliases move only through the gate, one move after the other, and back again; on both databases."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from luthier.spec.errors import NotFound, UserError
from luthier.store.aliases import Aliases, GateClosed, Moved, Verdict
from luthier.store.db import Database
from luthier.store.models import Models

NAME = "shop@production"


@pytest.fixture
def aliases(database: Database, models: Models) -> Aliases:
    """With the models a to e, and the checkpoint a:ckpt-step-1."""
    for name in "abcde":
        enter(database, models, name)
    enter(database, models, "a:ckpt-step-1", step=1)
    return Aliases(database)


def enter(database: Database, models: Models, name: str, step: int | None = None) -> None:
    folder = database.home / "runs" / name.replace(":", "-")
    folder.mkdir(parents=True)
    models.register(name, base="tiny", folder=folder, content_hash=name.encode().hex()[:64], step=step)


def meant(aliases: Aliases) -> str:
    return aliases.resolve(NAME).name


def test_promote_rollback_and_history(aliases: Aliases) -> None:
    for model in "abc":
        aliases.promote(NAME, model, by="key_1")
    assert meant(aliases) == "c"
    assert aliases.rollback(NAME).model == "b"
    aliases.promote(NAME, "d")
    assert [aliases.rollback(NAME).model, aliases.rollback(NAME).model] == ["b", "a"]
    with pytest.raises(UserError, match="no model that shop@production meant before"):
        aliases.rollback(NAME)
    moves = aliases.history(NAME)
    assert [(move.version, move.kind, move.model) for move in moves] == [
        (1, "promote", "a"),
        (2, "promote", "b"),
        (3, "promote", "c"),
        (4, "rollback", "b"),
        (5, "promote", "d"),
        (6, "rollback", "b"),
        (7, "rollback", "a"),
    ]
    assert moves[0].by == "key_1" and moves[3].by is None
    assert [move.model for move in aliases.list()] == ["a"]


def test_the_gate_holds_a_model_back_until_it_passes(aliases: Aliases) -> None:
    aliases.judge("a", Verdict(False, ["It forgot too much."]))
    assert aliases.verdict("a") == Verdict(False, ["It forgot too much."])
    with pytest.raises(GateClosed, match="a is not promoted: It forgot too much"):
        aliases.promote(NAME, "a")
    with pytest.raises(NotFound):
        aliases.history(NAME)
    assert aliases.resolve("a").name == "a", "kept, all the same"
    aliases.judge("a", Verdict(True, []))
    assert aliases.promote(NAME, "a").version == 1
    assert aliases.verdict("b") is None
    with pytest.raises(NotFound):
        aliases.judge("nobody", Verdict(True, []))


def test_names_that_cannot_be_and_models_that_cannot_be_promoted(aliases: Aliases) -> None:
    for name in ("shop", "@x", "a@b@c", "a b@c", "../a@b", "a@", "x\0@y"):
        with pytest.raises(UserError, match="alias: found"):
            aliases.promote(name, "a")
        with pytest.raises(NotFound):
            aliases.rollback(name.replace("\0", ""))
    with pytest.raises(UserError, match="is a checkpoint"):
        aliases.promote(NAME, "a:ckpt-step-1")
    with pytest.raises(NotFound):
        aliases.promote(NAME, "nobody")
    with pytest.raises(NotFound):
        aliases.resolve(NAME)


def test_the_same_model_again_is_no_move(aliases: Aliases) -> None:
    assert aliases.promote(NAME, "a") == aliases.promote(NAME, "a")
    assert len(aliases.history(NAME)) == 1


def test_a_move_that_expects_another_version_is_refused(aliases: Aliases) -> None:
    aliases.promote(NAME, "a", if_version=0)
    with pytest.raises(Moved, match="its version is 1, not 0"):
        aliases.promote(NAME, "b", if_version=0)
    aliases.promote(NAME, "b", if_version=1)
    with pytest.raises(Moved):
        aliases.rollback(NAME, if_version=1)
    assert aliases.rollback(NAME, if_version=2).model == "a"


def test_of_many_who_move_at_once_with_the_same_expectation_one_wins(aliases: Aliases) -> None:
    def move(model: str) -> bool:
        try:
            aliases.promote(NAME, model, if_version=0)
        except Moved:
            return False
        return True

    with ThreadPoolExecutor(5) as pool:
        won = list(pool.map(move, "abcde"))
    assert won.count(True) == 1
    assert meant(aliases) == "abcde"[won.index(True)]


def test_many_who_move_at_once_make_moves_one_after_the_other(aliases: Aliases) -> None:
    with ThreadPoolExecutor(5) as pool:
        list(pool.map(lambda model: aliases.promote(NAME, model), "abcde"))
    moves = aliases.history(NAME)
    assert [move.version for move in moves] == [1, 2, 3, 4, 5]
    assert sorted(move.model for move in moves) == list("abcde")
    assert meant(aliases) == moves[-1].model


def test_a_model_that_an_alias_means_cannot_be_deleted_and_one_it_meant_is_passed_over(
    aliases: Aliases, models: Models
) -> None:
    for model in "abc":
        aliases.promote(NAME, model)
    with pytest.raises(UserError, match="is what the alias shop@production means"):
        models.delete("c")
    models.delete("b")
    assert aliases.rollback(NAME).model == "a"
    models.delete("c")
    aliases.remove(NAME)
    models.delete("a")
    with pytest.raises(NotFound):
        aliases.remove(NAME)


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.sampled_from("abcde<"), max_size=12))
def test_a_rollback_is_the_pop_of_a_stack(aliases: Aliases, steps: list[str]) -> None:
    """Against the plain model: a list; promotions push unless they change nothing, rollbacks pop."""
    stack: list[str] = []
    for step in steps:
        if step == "<":
            if len(stack) > 1:
                stack.pop()
                assert aliases.rollback(NAME).model == stack[-1]
            else:
                with pytest.raises(UserError):
                    aliases.rollback(NAME)
        else:
            stack += [step] if stack[-1:] != [step] else []
            aliases.promote(NAME, step)
        if stack:
            assert meant(aliases) == stack[-1]
    if stack:
        aliases.remove(NAME)
