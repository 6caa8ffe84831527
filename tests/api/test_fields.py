"""docs/compatibility.md says the truth: every field of every body is sent, and is heard, unheard or refused."""

from __future__ import annotations

from typing import Any

import pytest
from fastapi.testclient import TestClient

from luthier.api.compatibility import Table, fields
from luthier.api.services import Services
from tests.api import driving
from tests.api.conftest import FakeRouter

CHAT, TEXT = "POST /v1/chat/completions", "POST /v1/completions"
JOBS, TUNES, UPLOADS = "POST /v1/fine_tuning/jobs", "POST /v1/fine-tunes", "POST /v1/uploads"
PERMISSIONS = "POST /v1/fine_tuning/checkpoints/{checkpoint}/permissions"
PROMOTE, ROLLBACK = "POST /v1/luthier/aliases/{alias}", "POST /v1/luthier/aliases/{alias}/rollback"
PARTS, COMPLETE = "POST /v1/uploads/{upload_id}/parts", "POST /v1/uploads/{upload_id}/complete"
LABEL, FILES = "POST /v1/chat/completions/{completion_id}", "POST /v1/files"
TUNED = "ft:tiny:luthier::12345678"
WRONG = {"wrong": 1}  # a value that no field takes
# What clients of any generation may send, by OpenAI's own description; the tables must know every word of it.
KNOWN = {
    CHAT: "model messages temperature top_p n max_completion_tokens max_tokens stop presence_penalty frequency_penalty "
    "logit_bias logprobs top_logprobs seed response_format tools tool_choice parallel_tool_calls functions "
    "function_call stream stream_options store metadata user safety_identifier prompt_cache_key service_tier "
    "reasoning_effort verbosity modalities audio prediction web_search_options moderation prompt_cache_options",
    TEXT: "model prompt max_tokens n best_of echo logprobs stop suffix temperature top_p presence_penalty "
    "frequency_penalty logit_bias seed user stream stream_options",
    JOBS: "model training_file validation_file suffix seed metadata integrations method hyperparameters",
    TUNES: "training_file validation_file model n_epochs batch_size learning_rate_multiplier prompt_loss_weight "
    "compute_classification_metrics classification_n_classes classification_positive_class classification_betas "
    "suffix hyperparameters",
    UPLOADS: "filename purpose bytes mime_type expires_after",
    COMPLETE: "part_ids md5",
    FILES: "file purpose expires_after",
}
# A good value for each field that is unheard or refused: it must not be its form that decides.
GOOD: dict[str, Any] = {
    "user": "someone",
    "safety_identifier": "x",
    "prompt_cache_key": "x",
    "prompt_cache_options": {"mode": "explicit"},
    "prompt_cache_retention": "24h",
    "service_tier": "flex",
    "reasoning_effort": "high",
    "verbosity": "low",
    "audio": {"voice": "alloy", "format": "wav"},
    "prediction": {"type": "content", "content": "x"},
    "web_search_options": {},
    "moderation": {"model": "omni-moderation-latest"},
    "suffix": "x",
    "any other": 1,
    "mime_type": "text/plain",
}
JSON_ROUTES = [route for route in fields() if route not in (FILES, PARTS)]
LINES = [(route, name, state) for route in JSON_ROUTES for name, (state, _) in fields()[route].items()]


def base(route: str, services: Services) -> tuple[str, dict[str, Any]]:
    """(path, a body that is good)."""
    path = route.removeprefix("POST ")
    if route == CHAT:
        return path, {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "seed": 1}
    if route == TEXT:
        return path, {"model": "tiny", "prompt": "hi", "seed": 1}
    if route == JOBS:
        return path, driving.body(services)
    if route == TUNES:
        return path, {"training_file": driving.training_file(services)}
    upload = {"filename": "f", "purpose": "user_data", "bytes": 3, "mime_type": "text/plain"}
    if route == UPLOADS:
        return path, upload
    if route == COMPLETE:
        made = services.uploads.create(**upload)
        part = services.uploads.add_part(made.id, [b"abc"])
        return path.replace("{upload_id}", made.id), {"part_ids": [part.id]}
    if route == PERMISSIONS:
        if TUNED not in [model.name for model in services.models.list()]:
            driving.register(services, TUNED)
        return path.replace("{checkpoint}", TUNED), {"project_ids": ["proj_a"]}
    if route in (PROMOTE, ROLLBACK):
        names = (TUNED, f"{TUNED}9")
        if TUNED not in [model.name for model in services.models.list()]:
            for name in names:
                driving.register(services, name)
        for name in names:
            services.aliases.promote("shop@production", name)
        return path.replace("{alias}", "shop@production"), {"model": TUNED} if route == PROMOTE else {}
    assert route == LABEL, route
    kept = {"id": "chatcmpl-" + "a" * 24, "model": "tiny", "created": 1}
    if not services.completions.list().data:
        services.completions.add(kept, {"messages": []}, None)
    return path.replace("{completion_id}", kept["id"]), {"metadata": {}}


def asked(client: TestClient, router: FakeRouter, path: str, body: dict[str, Any]) -> Any:
    """What the replica was asked, without its name, when `body` is answered."""
    router.asks.clear()
    answer = client.post(path, json=body)
    assert answer.status_code == 200, answer.text
    return [ask.model_dump(exclude={"id"}) for _, ask in router.asks]


def nested(name: str, value: Any) -> dict[str, Any]:
    """method.dpo: x -> {"method": {"type": "dpo", "dpo": x}}; any other a.b: x -> {"a": {"b": x}}"""
    outer, _, inner = name.partition(".")
    if not inner:
        return {outer: value}
    return {outer: {"type": inner, inner: value} if outer == "method" else {inner: value}}


@pytest.mark.parametrize("route", KNOWN)
def test_the_tables_know_every_field_that_clients_send(route: str) -> None:
    assert set(KNOWN[route].split()) <= set(fields()[route])


@pytest.mark.parametrize(("route", "name"), [(route, name) for route, name, state in LINES if state == "supported"])
def test_a_supported_field_is_heard(client: TestClient, services: Services, route: str, name: str) -> None:
    """A value that it cannot take is refused, by its name."""
    path, body = base(route, services)
    answer = client.post(path, json=body | nested(name, WRONG))
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"].startswith(name), answer.text


@pytest.mark.parametrize(("route", "name"), [(route, name) for route, name, state in LINES if state == "refused"])
def test_a_refused_field_is_refused_by_name(client: TestClient, services: Services, route: str, name: str) -> None:
    path, body = base(route, services)
    answer = client.post(path, json=body | nested(name, GOOD.get(name, {})))
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert name.startswith(error["param"]), error
    assert error["code"] in ("unsupported_parameter", "unsupported_value"), error


@pytest.mark.parametrize(("route", "name"), [(route, name) for route, name, state in LINES if state == "ignored"])
def test_an_ignored_field_changes_nothing(
    client: TestClient, router: FakeRouter, services: Services, route: str, name: str
) -> None:
    path, body = base(route, services)
    assert asked(client, router, path, body | {name: GOOD[name]}) == asked(client, router, path, body)


@pytest.mark.parametrize("route", [route for route in JSON_ROUTES if route not in (CHAT, TEXT)])
def test_an_unlisted_field_is_refused_where_something_is_made(
    client: TestClient, services: Services, route: str
) -> None:
    path, body = base(route, services)
    answer = client.post(path, json=body | {"unheard_of": 1})
    assert answer.status_code == 400, answer.text
    assert (answer.json()["error"]["param"], answer.json()["error"]["code"]) == ("unheard_of", "unknown_parameter")


@pytest.mark.parametrize("route", JSON_ROUTES)
def test_null_is_the_same_as_absent(client: TestClient, router: FakeRouter, services: Services, route: str) -> None:
    path, body = base(route, services)
    table: Table = fields()[route]
    optional = {name: None for name in table if name not in body and "." not in name and name != "any other"}
    if route in (CHAT, TEXT):
        assert asked(client, router, path, body | optional) == asked(client, router, path, body)
        return
    answer = client.post(path, json=body | optional)
    assert answer.status_code == 200, answer.text
