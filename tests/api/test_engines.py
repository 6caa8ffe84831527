"""/engines: other names for models, and inference that goes on to today's routes."""

from __future__ import annotations

from typing import Any

import pytest
from fastapi import FastAPI, Request
from fastapi.responses import StreamingResponse
from fastapi.testclient import TestClient

from luthier.api import engines, faults
from luthier.api.errors import ApiError
from luthier.api.services import Services
from tests.api import driving

TUNED = "tiny:ft-luthier:cats-2026-01-02-03-04-05"


def test_models_are_engines(client: TestClient, services: Services) -> None:
    driving.register(services, TUNED)
    listed = client.get("/v1/engines").json()
    assert [one["id"] for one in listed["data"]] == ["tiny", TUNED]
    assert listed["data"][1] == {
        "id": TUNED,
        "object": "engine",
        "owner": "luthier",
        "ready": True,
        "created": None,
        "permissions": None,
    }
    assert client.get(f"/v1/engines/{TUNED.replace(':', '%3A')}").json() == listed["data"][1]
    assert client.get("/v1/engines/davinci").json()["owner"] == "system"
    answer = client.get("/v1/engines/tiny:ft-gone")
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")


@pytest.fixture
def echo() -> TestClient:
    """Engines beside routes of inference that say what they got."""
    app = FastAPI()
    faults.install(app)
    app.include_router(engines.router, prefix="/v1")

    @app.post("/v1/completions")
    async def complete(request: Request) -> dict[str, Any]:
        body = await request.json()
        if body.get("n") == 0:
            raise ApiError(400, "n: found 0.", param="n")
        return {"at": request.url.path, "body": body, "agent": request.headers["user-agent"]}

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> StreamingResponse:
        body = await request.json()
        return StreamingResponse(
            iter([f"data: {body['model']}\n\n", "data: [DONE]\n\n"]), media_type="text/event-stream"
        )

    return TestClient(app, headers={"user-agent": "old"})


def test_a_request_goes_on_with_its_engine_as_model(echo: TestClient) -> None:
    answer = echo.post(f"/v1/engines/{TUNED}/completions", json={"prompt": "a", "stop": None})
    assert answer.json() == {
        "at": "/v1/completions",
        "body": {"prompt": "a", "stop": None, "model": TUNED},
        "agent": "old",
    }
    stream = echo.post("/v1/engines/org/base/chat/completions", json={"messages": []})
    assert stream.text == "data: org/base\n\ndata: [DONE]\n\n"


def test_its_errors_come_back(echo: TestClient) -> None:
    answer = echo.post("/v1/engines/tiny/completions", json={"n": 0})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "n")
    for body in ("[]", "{", '{"model": "other"}'):
        assert echo.post("/v1/engines/tiny/completions", content=body).status_code == 400
