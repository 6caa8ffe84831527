"""Pages of lists: walked to the end they are the whole list, in both orders, while the list grows and shrinks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from luthier.spec.errors import NotFound, UserError
from luthier.store.db import Database, Order, Page
from luthier.store.files import Files
from luthier.store.history import EventDraft, History
from luthier.store.jobs import Jobs
from luthier.store.leases import Leases
from luthier.store.models import Models
from tests.store.asks import run, submit
from tests.store.clock import Clock

COUNT = 7
Paged = Callable[..., Page[Any]]


def _add_file(files: Files) -> str:
    return files.create([b"x"], filename="x", purpose="fine-tune").id


@pytest.fixture(params=["files", "jobs", "events", "checkpoints", "permissions"])
def paged(
    request: pytest.FixtureRequest, database: Database, files: Files, jobs: Jobs, leases: Leases, history: History,
    models: Models,
) -> tuple[Paged, Callable[[], object]]:  # fmt: skip
    """A way to ask for a page of a list, and a way to make the list longer by one."""
    if request.param == "files":
        return files.list, lambda: _add_file(files)
    if request.param == "jobs":
        return jobs.list, lambda: submit(jobs)
    if request.param == "permissions":
        models.register("m", base="b", folder=database.home / "m", content_hash="0" * 64)
        grown = iter(range(1000))
        return (
            lambda **asked: models.permissions("m", **asked),
            lambda: models.permit("m", [f"proj_{next(grown)}"]),
        )
    job, lease = run(jobs, leases)
    numbers = iter(range(1, 1000))
    if request.param == "events":
        return (
            lambda **asked: history.events(job.id, **asked),
            lambda: leases.append_events(lease, [EventDraft("m", next(numbers))]),
        )
    return (
        lambda **asked: history.checkpoints(job.id, **asked),
        lambda: leases.add_checkpoint(lease, step=next(numbers), model="m", metrics={}),
    )


def walk(ask: Paged, limit: int, order: Order, between: Callable[[], object] = lambda: None) -> list[str]:
    """As the official clients do: the last id of a page is the next cursor, until has_more is false."""
    got: list[str] = []
    after = None
    while True:
        page = ask(after=after, limit=limit, order=order)
        assert len(page.data) <= limit
        got += [row.id for row in page.data]
        if not page.has_more:
            return got
        assert len(page.data) == limit
        after = page.data[-1].id
        between()


def test_pages_walked_are_the_list(paged: tuple[Paged, Callable[[], object]]) -> None:
    ask, grow = paged
    for _ in range(COUNT):
        grow()
    whole = ask(limit=1000, order="asc")
    ids = [row.id for row in whole.data]
    assert len(ids) >= COUNT and len(set(ids)) == len(ids) and not whole.has_more
    for limit in (1, 2, len(ids) - 1, len(ids), len(ids) + 1):
        assert walk(ask, limit, "asc") == ids
        assert walk(ask, limit, "desc") == ids[::-1]
    assert not ask(limit=len(ids)).has_more and ask(limit=len(ids) - 1).has_more
    assert ask(after=ids[-1], order="asc") == Page((), False)
    assert ask(after=ids[0], order="desc") == Page((), False)


@pytest.mark.parametrize("order", ["asc", "desc"])
def test_a_list_that_grows_repeats_nothing_and_leaves_nothing_out(
    paged: tuple[Paged, Callable[[], object]], order: Order
) -> None:
    ask, grow = paged
    for _ in range(COUNT):
        grow()
    before = [row.id for row in ask(limit=1000, order=order).data]
    left = iter(range(3))  # an endless walk otherwise: in ascending order the new rows are still to come
    got = walk(ask, 2, order, lambda: grow() if next(left, None) is not None else None)
    assert len(set(got)) == len(got)
    assert [id for id in got if id in before] == before


def test_a_list_that_is_deleted_while_it_is_walked(files: Files, clock: Clock) -> None:
    ids = [_add_file(files) for _ in range(COUNT)]
    page = files.list(limit=2)
    got = []
    while True:
        for file in page.data:
            files.delete(file.id)
            got.append(file.id)
        if not page.has_more:
            break
        page = files.list(limit=2, after=page.data[-1].id)
    assert got == ids[::-1]
    assert files.list(after=got[0]).data == ()
    clock.forward(24 * 3600 + 1)
    files.delete(_add_file(files))
    with pytest.raises(NotFound):
        files.list(after=got[0])


@pytest.mark.parametrize("cursor", ["", "nothing", "../..", "a\x00b", "\ud800", "x" * 5000])
def test_a_cursor_that_never_was(paged: tuple[Paged, Callable[[], object]], cursor: str) -> None:
    with pytest.raises(NotFound) as caught:
        paged[0](after=cursor)
    assert caught.value.param == "after"


def test_a_cursor_of_another_list(files: Files, jobs: Jobs) -> None:
    gone = _add_file(files)
    files.delete(gone)
    with pytest.raises(NotFound):
        jobs.list(after=gone)


def test_bounds_are_checked(files: Files) -> None:
    with pytest.raises(UserError, match="limit: found 0"):
        files.list(limit=0)
    with pytest.raises(UserError, match="order: found 'up'"):
        files.list(order="up")  # type: ignore[arg-type]
