"""docs/compatibility.md tells of every route and of every field, and of nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from luthier.api.app import create_app
from luthier.api.compatibility import FIELDS, STATES, fields, render, routes
from luthier.api.services import Services

PAGE = Path(__file__).parents[2] / "docs" / "compatibility.md"


def test_the_page_is_what_the_tables_say() -> None:
    written = PAGE.read_text(encoding="utf-8")
    assert written == render(), "run: python -m luthier.api.compatibility > docs/compatibility.md"


def test_every_route_of_the_app_is_on_the_page(services: Services) -> None:
    page = render()
    document = create_app(services).openapi()
    served = {f"{method.upper()} {path}" for path, methods in document["paths"].items() for method in methods}
    assert served
    for route in served:
        assert f"| `{route.replace(':path}', '}')}` |" in page, route
    assert {f"{method} {path}" for method, path, route in routes() if route.include_in_schema} == served


def test_tables_are_of_routes_that_are_there_and_say_a_state_and_a_reason() -> None:
    there = {f"{method} {path}" for method, path, _ in routes()}
    assert set(FIELDS) <= there
    for route, table in fields().items():
        for name, (state, reason) in table.items():
            assert state in STATES, (route, name)
            assert reason or state == "supported", (route, name)


def test_every_field_of_a_body_has_its_line() -> None:
    for method, path, route in routes():
        model: Any = None if route.body_field is None else route.body_field.field_info.annotation
        asked = getattr(model, "model_fields", None)
        if asked is not None:
            names = {field.alias or name for name, field in asked.items()}
            assert names <= set(fields()[f"{method} {path}"]), path
