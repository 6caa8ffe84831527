"""Stored chat completions: kept whole, found by model and metadata, walked while they are deleted."""

from __future__ import annotations

import pytest

from luthier.spec.errors import NotFound
from luthier.store.completions import Completions
from luthier.store.db import Database, new_id

REQUEST = {"messages": [{"role": "user", "content": "half \ud83d, nul \x00, 词"}], "temperature": 0}


@pytest.fixture
def completions(database: Database) -> Completions:
    return Completions(database)


def keep(completions: Completions, model: str = "m", metadata: dict[str, str] | None = None) -> str:
    answer = {"id": new_id("chatcmpl-"), "model": model, "created": 7, "choices": [{"index": 0}]}
    return completions.add(answer, REQUEST, metadata).id


def test_what_is_kept_comes_back_whole(completions: Completions) -> None:
    name = keep(completions, metadata={"tag": "a\x00b"})
    found = completions.get(name)
    assert (found.model, found.created_at, found.request, found.metadata) == ("m", 7, REQUEST, {"tag": "a\x00b"})
    assert found.completion == {"id": name, "model": "m", "created": 7, "choices": [{"index": 0}]}


def test_found_by_model_and_every_pair(completions: Completions) -> None:
    both = keep(completions, "m", {"a": "1", "b": "2"})
    one = keep(completions, "m", {"a": "1"})
    other = keep(completions, "n", {"a": "1"})
    assert [found.id for found in completions.list(metadata={"a": "1"}).data] == [both, one, other]
    assert [found.id for found in completions.list(metadata={"a": "1"}, model="m").data] == [both, one]
    assert [found.id for found in completions.list(metadata={"a": "1", "b": "2"}).data] == [both]
    assert completions.list(metadata={"a": "2"}).data == ()


def test_new_metadata_replaces_the_old(completions: Completions) -> None:
    name = keep(completions, metadata={"a": "1"})
    assert completions.set_metadata(name, {"b": "2"}).metadata == {"b": "2"}
    assert completions.list(metadata={"a": "1"}).data == ()
    assert completions.list(metadata={"b": "2"}).data[0].id == name
    assert completions.set_metadata(name, None).metadata is None


def test_walked_while_deleted(completions: Completions) -> None:
    names = [keep(completions) for _ in range(5)]
    seen: list[str] = []
    after = None
    while True:
        page = completions.list(after=after, limit=2)
        for found in page.data:
            seen.append(found.id)
            completions.delete(found.id)
        if not page.has_more:
            break
        after = seen[-1]
    assert seen == names
    assert completions.list().data == ()


@pytest.mark.parametrize("name", ["chatcmpl-" + "x" * 24, "chatcmpl-../x", "", "file-" + "x" * 24])
def test_what_is_not_there(completions: Completions, name: str) -> None:
    for ask in (completions.get, completions.delete, lambda name: completions.set_metadata(name, {})):
        with pytest.raises(NotFound):
            ask(name)
