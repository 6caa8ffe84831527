"""The door."""

from __future__ import annotations

import openai
import pytest
from fastapi.testclient import TestClient

from tests.api.conftest import Live


def test_an_unknown_route_is_named_in_openais_shape(client: TestClient) -> None:
    answer = client.get("/v1/nothing")
    assert answer.status_code == 404
    assert answer.json() == {
        "error": {
            "message": "Invalid URL (GET /v1/nothing)",
            "type": "invalid_request_error",
            "param": None,
            "code": None,
        }
    }


def test_a_wrong_key_opens_nothing(live: Live) -> None:
    with (
        pytest.raises(openai.AuthenticationError) as caught,
        openai.OpenAI(base_url=live.base_url, api_key="sk-lu-wrong-and-long-enough-1234") as client,
    ):
        client.get("/nothing", cast_to=object)
    assert caught.value.code == "invalid_api_key"
    assert "wrong" not in str(caught.value)
