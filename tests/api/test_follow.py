"""Followers of jobs: the whole history, then live, to the end; many of them, and some that leave."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest
from fastapi.testclient import TestClient

from luthier.api import follow
from luthier.api.app import create_app
from luthier.api.legacy_wire import event_object
from luthier.api.services import Services
from luthier.spec.errors import NotNow
from luthier.store.history import Event
from tests.api import driving
from tests.api.conftest import Live


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(follow, "POLL_SECONDS", 0.02)


def legacy(client: TestClient, services: Services) -> str:
    answer = client.post("/v1/fine-tunes", json={"training_file": driving.training_file(services)})
    return str(answer.json()["id"])


def told(text: str) -> list[str]:
    """The data of a stream; the whole of it is checked for what clients cannot read."""
    blocks = text.split("\n\n")
    assert blocks.pop() == ""
    for block in blocks:
        assert block.startswith((": ", "data: "))
        assert "\n" not in block
    data = [block.removeprefix("data: ") for block in blocks if block.startswith("data: ")]
    assert data[-1] == "[DONE]"
    return [json.loads(one)["message"] for one in data[:-1]]


def test_a_job_that_is_over_is_told_whole(client: TestClient, services: Services) -> None:
    job_id = legacy(client, services)
    lease = driving.start(services)
    driving.steps(services, lease, 1, 700, 700)  # more than a page; not told by the older API
    driving.finish(services, lease, "tiny:ft-luthier-2026-01-02-03-04-05")
    answer = client.get(f"/v1/fine-tunes/{job_id}/events", params={"stream": "true"})
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.headers["cache-control"] == "no-cache"
    said = told(answer.text)
    assert said[0] == f"Created fine-tune: {job_id}"
    assert said[-1] == "Fine-tune succeeded"
    assert len(said) == 7
    assert '"error"' not in answer.text


def test_a_job_of_today_can_be_followed_too(client: TestClient, services: Services) -> None:
    job_id = client.post("/v1/fine_tuning/jobs", json=driving.body(services)).json()["id"]
    driving.steps(services, lease := driving.start(services), 1, 1200, 1200)
    driving.finish(services, lease)
    answer = client.get(f"/v1/fine_tuning/jobs/{job_id}/events", params={"stream": "true"})
    said = told(answer.text)
    assert said[4:1204] == [f"Step {step}/1200: training loss=0.50" for step in range(1, 1201)]
    assert said[-1] == "The job has successfully completed"


@contextlib.contextmanager
def following(live: Live, job_id: str) -> Iterator[Iterator[str]]:
    headers = {"Authorization": f"Bearer {live.key}"}
    url = f"{live.base_url}/fine-tunes/{job_id}/events?stream=true"
    with httpx2.stream("GET", url, headers=headers, timeout=20) as answer:
        assert answer.status_code == 200
        yield (line.removeprefix("data: ") for line in answer.iter_lines() if line.startswith("data: "))


def message(line: str) -> str:
    return str(json.loads(line)["message"])


def test_events_arrive_live_and_a_follower_that_leaves_disturbs_nobody(services: Services, live: Live) -> None:
    file_id = driving.training_file(services)
    job, _ = services.jobs.submit(request={}, model="tiny", training_file=file_id, kind="legacy")
    with following(live, job.id) as first:
        assert message(next(first)).startswith("Created fine-tune")
        with following(live, job.id) as second:
            assert message(next(second)).startswith("Created fine-tune")
        lease = driving.start(services)
        assert message(next(first)).startswith("Fine-tune enqueued")
        assert message(next(first)) == "Fine-tune started"
        with following(live, job.id) as again:
            assert [message(next(again)) for _ in range(3)][-1] == "Fine-tune started"
            services.jobs.request_cancel(job.id)
            services.leases.release(lease)
            for lines in (first, again):
                assert message(next(lines)) == "Fine-tune cancelled"
                assert list(lines) == ["[DONE]"]


def test_many_followers_share_one_look(services: Services, monkeypatch: pytest.MonkeyPatch) -> None:
    file_id = driving.training_file(services)
    job, _ = services.jobs.submit(request={}, model="tiny", training_file=file_id, kind="legacy")
    looks = []
    look = follow.Followers._look

    def counted(self: follow.Followers, job_id: str) -> tuple[int, bool]:
        looks.append(threading.get_ident())
        return look(self, job_id)

    monkeypatch.setattr(follow.Followers, "_look", counted)
    monkeypatch.setattr(follow, "POLL_SECONDS", 0.05)

    async def scene() -> list[list[str]]:
        followers = follow.Followers(services)

        async def one() -> list[str]:
            return [event.message async for event in followers.events(job.id) if event is not None]

        tasks = [asyncio.create_task(one()) for _ in range(50)]
        started = time.monotonic()
        await asyncio.sleep(0.3)
        most = (time.monotonic() - started) / 0.05 + 2
        assert len(looks) <= most
        await asyncio.to_thread(services.jobs.request_cancel, job.id)
        heard = await asyncio.gather(*tasks)
        assert followers._watches == {}
        return heard

    heard = asyncio.run(scene())
    assert len(heard) == 50
    assert all(one == heard[0] for one in heard)
    assert heard[0][-1] == "Fine-tune cancelled"
    assert threading.main_thread().ident not in looks


def test_silence_is_filled_with_comments(services: Services, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(follow, "KEEP_ALIVE_SECONDS", 0.05)
    file_id = driving.training_file(services)
    job, _ = services.jobs.submit(request={}, model="tiny", training_file=file_id, kind="legacy")

    async def scene() -> list[Any]:
        heard: list[Any] = []
        async with contextlib.aclosing(follow.Followers(services).events(job.id)) as events:
            async for event in events:
                heard.append(event)
                if len(heard) == 5:
                    return heard
        return heard

    heard = asyncio.run(scene())
    assert isinstance(heard[0], Event)
    assert heard[-2:] == [None, None]


def test_a_job_that_is_deleted_ends_its_streams(services: Services) -> None:
    file_id = driving.training_file(services)
    job, _ = services.jobs.submit(request={}, model="tiny", training_file=file_id, kind="legacy")

    async def scene() -> int:
        events = follow.Followers(services).events(job.id)
        await anext(events)
        services.jobs.request_cancel(job.id)
        services.jobs.delete(job.id)
        return len([event async for event in events])

    assert asyncio.run(scene()) <= 2


def test_a_store_that_does_not_answer_is_said_in_the_stream(
    client: TestClient, services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_id = legacy(client, services)

    def silent(self: follow.Followers, job_id: str) -> tuple[int, bool]:
        raise NotNow("The database does not answer.")

    monkeypatch.setattr(follow.Followers, "_look", silent)
    text = client.get(f"/v1/fine-tunes/{job_id}/events?stream=true").text
    last = text.strip().split("\n\n")[-1].removeprefix("data: ")
    assert json.loads(last)["error"]["message"] == "The database does not answer."


def test_a_server_that_stops_sends_its_followers_away(services: Services) -> None:
    file_id = driving.training_file(services)
    job, _ = services.jobs.submit(request={}, model="tiny", training_file=file_id, kind="legacy")

    async def scene() -> list[str]:
        app = create_app(services)
        heard = []
        body = follow.stream(app, job.id, event_object).body_iterator
        async for line in body:
            heard.append(str(line))
            if len(heard) == 2:
                follow.end_all(app)
        return heard

    heard = asyncio.run(scene())
    assert "The server is stopping." in json.loads(heard[-1].removeprefix("data: "))["error"]["message"]
    assert "[DONE]" not in "".join(heard)
