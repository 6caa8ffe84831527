"""Aliases over HTTP: moved through the gate, meant wherever a model is named."""

from __future__ import annotations

import json

import pytest
from fastapi.testclient import TestClient

from luthier.api.aliases import PROMOTE_FIELDS, ROLLBACK_FIELDS, PromoteRequest, RollbackRequest
from luthier.api.asking import start_from
from luthier.api.errors import ApiError
from luthier.api.services import Services
from luthier.api.voices import find_voice
from luthier.store.aliases import Verdict
from tests.api import driving

ALIAS = "shop@production"
PATH = f"/v1/luthier/aliases/{ALIAS}"
ONE, TWO, BAD = (f"ft:tiny:luthier:{name}:12345678" for name in ("one", "two", "bad"))


@pytest.fixture
def models(services: Services) -> Services:
    for name in (ONE, TWO, BAD):
        driving.register(services, name)
    services.aliases.judge(BAD, Verdict(False, ["It lost 9.0% of its general ability, more than 5.0%."]))
    return services


def test_promote_roll_back_and_look(client: TestClient, models: Services) -> None:
    made = client.post(PATH, json={"model": ONE, "if_version": 0}).json()
    assert made == {
        "id": ALIAS, "object": "luthier.alias", "model": ONE, "version": 1, "moved_at": made["moved_at"]
    }  # fmt: skip
    assert client.post(PATH, json={"model": TWO}).json()["version"] == 2
    assert client.get("/v1/luthier/aliases").json()["data"][0]["model"] == TWO
    back = client.post(f"{PATH}/rollback", json={"if_version": 2}).json()
    assert (back["model"], back["version"]) == (ONE, 3)
    history = client.get(PATH).json()["history"]
    assert [(move["kind"], move["model"]) for move in history] == [
        ("promote", ONE), ("promote", TWO), ("rollback", ONE)
    ]  # fmt: skip
    assert all(move["by"].startswith("key_") for move in history)
    nothing = client.post(f"{PATH}/rollback")
    assert (nothing.status_code, nothing.json()["error"]["code"]) == (400, "nothing_to_roll_back")
    assert client.delete(PATH).json() == {"id": ALIAS, "object": "luthier.alias", "deleted": True}
    assert client.get(PATH).status_code == 404


def test_the_gate_and_the_version_are_refused(client: TestClient, models: Services) -> None:
    shut = client.post(PATH, json={"model": BAD})
    assert (shut.status_code, shut.json()["error"]["code"]) == (400, "gate_failed")
    assert "more than 5.0%" in shut.json()["error"]["message"]
    client.post(PATH, json={"model": ONE})
    for path, body in ((PATH, {"model": TWO, "if_version": 0}), (f"{PATH}/rollback", {"if_version": 7})):
        late = client.post(path, json=body)
        assert (late.status_code, late.json()["error"]["code"]) == (400, "alias_moved")


def test_what_is_refused(client: TestClient, models: Services) -> None:
    for body in ({}, {"model": 1}, {"model": ONE, "x": 1}, {"model": ONE, "if_version": -1}):
        assert client.post(PATH, json=body).status_code == 400, body
    assert client.post("/v1/luthier/aliases/shop", json={"model": ONE}).json()["error"]["param"] == "alias"
    assert client.post(PATH, json={"model": "ft:nobody"}).status_code == 404
    for name in ("shop@gone", "%00", "..%2Fa@b"):
        for answer in (
            client.get(f"/v1/luthier/aliases/{name}"),
            client.delete(f"/v1/luthier/aliases/{name}"),
            client.post(f"/v1/luthier/aliases/{name}/rollback"),
        ):
            assert answer.status_code == 404, name


def test_an_alias_is_a_model_wherever_one_is_named(client: TestClient, models: Services) -> None:
    client.post(PATH, json={"model": ONE})
    assert client.get(f"/v1/models/{ALIAS}").json()["id"] == ALIAS
    assert ALIAS in [model["id"] for model in client.get("/v1/models").json()["data"]]
    start = start_from(models, ALIAS)
    assert (start.parent, start.base) == (ONE, "tiny")
    assert start.note is not None and ONE in start.note
    client.post(PATH, json={"model": TWO})
    assert start_from(models, ALIAS).parent == TWO
    with pytest.raises(ApiError):
        start_from(models, "shop@staging")


def test_a_chat_by_an_alias_is_answered_by_what_it_means(models: Services) -> None:
    place = models.models.get(ONE).folder
    base = models.folders["tiny"]
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (place / name).write_bytes((base / name).read_bytes())
    (place / "adapter_config.json").write_text(json.dumps({}))
    models.aliases.promote(ALIAS, ONE)
    voice = find_voice(models, ALIAS)
    assert (voice.name, voice.adapter) == (ONE, place)


def test_a_model_in_use_is_not_deleted(client: TestClient, models: Services) -> None:
    client.post(PATH, json={"model": ONE})
    kept = client.delete(f"/v1/models/{ONE}")
    assert (kept.status_code, kept.json()["error"]["code"]) == (400, "model_in_use")
    assert models.models.get(ONE).folder.is_dir()


def test_the_papers_tell_of_every_field() -> None:
    assert set(PROMOTE_FIELDS) == set(PromoteRequest.model_fields)
    assert set(ROLLBACK_FIELDS) == set(RollbackRequest.model_fields)
