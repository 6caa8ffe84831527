"""Requests made up from the OpenAPI document: whatever comes, the answer is one that it names, never a 5xx."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import content_type_conformance, status_code_conformance

from luthier.api.app import create_app
from luthier.settings import Settings
from luthier.store.db import Database
from tests.api.conftest import BASE, FakeRouter, make_services

CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance]


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory, base_folder: Path) -> Iterator[schemathesis.BaseSchema]:
    home = tmp_path_factory.mktemp("schema") / "home"
    database = Database(home)
    database.migrate()
    made = Settings(home=home, bases=BASE, hub="off", requests_per_minute=10**6)
    services = make_services(made, database, FakeRouter(), {BASE: base_folder})
    token = services.keys.create("schema", "user")[1]
    schema = schemathesis.openapi.from_asgi("/openapi.json", create_app(services))
    schema.config.update(headers={"Authorization": f"Bearer {token}"})
    yield schema
    database.close()


def test_every_answer_is_documented(api: schemathesis.BaseSchema, subtests: pytest.Subtests) -> None:
    for found in api.get_all_operations():
        operation = found.ok()
        wrong = operation.as_strategy(generation_mode=GenerationMode.NEGATIVE)

        @given(case=operation.as_strategy() | wrong)
        @settings(
            max_examples=15, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
        )
        def holds(case: schemathesis.Case) -> None:
            case.call_and_validate(checks=CHECKS)

        with subtests.test(operation.label):
            holds()
