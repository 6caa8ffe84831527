"""Models: bases, tuned ones and checkpoints."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import openai
import pytest
from fastapi.testclient import TestClient

from luthier.api.services import Services
from tests.api.conftest import BASE, Live

TUNED = "ft:tiny:luthier:drone:AbC123"


def register(services: Services, name: str, folder: str = "runs/one/model", step: int | None = None) -> Path:
    place = services.settings.home / folder
    place.mkdir(parents=True, exist_ok=True)
    (place / "adapter_config.json").write_text("{}")
    services.models.register(name, base=BASE, folder=place, content_hash="0" * 64, step=step)
    return place


@pytest.fixture
def sdk(live: Live) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=live.base_url, api_key=live.key, max_retries=0) as client:
        yield client


def test_sdk_lists_retrieves_and_deletes(sdk: openai.OpenAI, services: Services) -> None:
    place = register(services, TUNED)
    register(services, f"{TUNED}:ckpt-step-4", "runs/one/published/4", step=4)
    models = list(sdk.models.list())
    assert [(model.id, model.owned_by) for model in models] == [
        (BASE, "system"),
        (TUNED, "luthier"),
        (f"{TUNED}:ckpt-step-4", "luthier"),
    ]
    assert sdk.models.retrieve(TUNED) == models[1]
    assert sdk.models.retrieve(BASE).object == "model"
    gone = sdk.models.delete(TUNED)
    assert (gone.id, gone.object, gone.deleted) == (TUNED, "model", True)
    assert not place.exists()
    assert (place.parent / "published" / "4").exists()
    for ask in (sdk.models.retrieve, sdk.models.delete):
        with pytest.raises(openai.NotFoundError) as caught:
            ask(TUNED)
        assert (caught.value.code, caught.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.PermissionDeniedError):
        sdk.models.delete(BASE)


@pytest.mark.parametrize("name", ["ft:a/b:org::x", "org/name", "a:ft-personal-2026-01-01-00-00-00"])
def test_names_may_hold_colons_and_slashes_written_any_way(client: TestClient, services: Services, name: str) -> None:
    register(services, name)
    for path in (name, quote(name, safe=""), quote(name, safe=":"), quote(name, safe="/")):
        assert client.get(f"/v1/models/{path}").json()["id"] == name
    assert client.delete(f"/v1/models/{quote(name, safe='')}").json()["deleted"] is True


@pytest.mark.parametrize("name", ["nothing", "..%2f..%2f..%2ftmp", "%2Fetc%2Fpasswd", "a%00b", "x" * 3000])
def test_unknown_names(client: TestClient, name: str) -> None:
    for answer in (client.get(f"/v1/models/{name}"), client.delete(f"/v1/models/{name}")):
        assert answer.status_code == 404
        assert answer.json()["error"]["code"] == "model_not_found"


def test_openais_names_mean_the_default_base(client: TestClient) -> None:
    answer = client.get("/v1/models/gpt-4o-mini")
    assert (answer.status_code, answer.json()["id"], answer.json()["owned_by"]) == (200, "gpt-4o-mini", "system")
    assert client.delete("/v1/models/gpt-4o-mini").status_code == 403


def test_a_folder_that_another_model_shares_stays(client: TestClient, services: Services) -> None:
    place = register(services, TUNED)
    register(services, "ft:tiny:luthier::other")
    assert client.delete(f"/v1/models/{TUNED}").status_code == 200
    assert place.exists()
