"""Stored chat completions, on both databases."""

from __future__ import annotations

import pytest

from luthier.spec.errors import NotFound
from luthier.store.completions import Completion, Completions
from luthier.store.db import Database, new_id

MESSAGES = [{"role": "user", "content": "hi\ud800"}]


@pytest.fixture
def stored(database: Database) -> Completions:
    return Completions(database)


def save(stored: Completions, model: str = "m", **metadata: str) -> Completion:
    name = new_id("chatcmpl-")
    return stored.save(name, model=model, answer={"id": name, "n": 1}, messages=MESSAGES, metadata=metadata or None)


def test_kept_as_it_was(stored: Completions) -> None:
    made = save(stored, tag="a")
    assert stored.get(made.id) == made
    assert (made.model, made.metadata, made.answer, made.messages) == (
        "m",
        {"tag": "a"},
        {"id": made.id, "n": 1},
        MESSAGES,
    )


def test_listed_by_model_and_metadata_oldest_first(stored: Completions) -> None:
    made = [save(stored, model, tag=tag) for model, tag in (("m", "a"), ("n", "a"), ("m", "b"), ("m", "a"))]
    ids = [one.id for one in made]
    assert [one.id for one in stored.list().data] == ids
    assert [one.id for one in stored.list(order="desc").data] == ids[::-1]
    assert [one.id for one in stored.list(model="m", metadata={"tag": "a"}).data] == [ids[0], ids[3]]
    first = stored.list(limit=2)
    assert (first.has_more, [one.id for one in first.data]) == (True, ids[:2])
    stored.delete(ids[1])
    assert [one.id for one in stored.list(after=ids[1]).data] == ids[2:]
    with pytest.raises(NotFound):
        stored.list(after="chatcmpl-nothing")


def test_metadata_is_replaced_and_found_anew(stored: Completions) -> None:
    made = save(stored, tag="a", other="x")
    assert stored.update(made.id, {"tag": "b"}).metadata == {"tag": "b"}
    assert stored.list(metadata={"tag": "a"}).data == ()
    assert [one.id for one in stored.list(metadata={"tag": "b"}).data] == [made.id]
    assert stored.update(made.id, None).metadata is None
    assert stored.list(metadata={"tag": "b"}).data == ()


def test_what_is_not_there(stored: Completions) -> None:
    for name in ("chatcmpl-" + "a" * 24, "../x", ""):
        for act in (stored.get, stored.delete, lambda name: stored.update(name, {})):
            with pytest.raises(NotFound):
                act(name)
