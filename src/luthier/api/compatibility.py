"""docs/compatibility.md, rendered from the routes themselves and from the tables of fields that lie beside them.

`python -m luthier.api.compatibility > docs/compatibility.md` writes it; a test compares the two.
Does not know: what a route does beyond its own words.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

from fastapi import APIRouter
from fastapi.routing import APIRoute

from luthier.api import aliases, chat_wire, completions, health, jobs, legacy_wire, metrics, permissions
from luthier.api.app import ROUTERS
from luthier.api.choices import CHOICES, ELSEWHERE

Table = dict[str, tuple[str, str]]
STATES = ("supported", "ignored", "refused")
PREFIX = "/v1"

EXPIRY = "`anchor` created_at and `seconds` from 3600 to 2592000."
FILE_FIELDS: Table = {
    "file": ("supported", "Before or after the other parts; with purpose fine-tune it must be lines of JSON objects."),
    "purpose": ("supported", "assistants, batch, evals, fine-tune, user_data, vision."),
    "expires_after": ("supported", f"{EXPIRY} In brackets, as clients write forms; in other words it is refused."),
    "any other": ("ignored", "Older clients send `model`."),
}
UPLOAD_FIELDS: Table = {
    "filename": ("supported", "Kept as it is, never part of a path."),
    "purpose": ("supported", "As for files."),
    "bytes": ("supported", "The parts must come to it."),
    "mime_type": ("ignored", "Contents are served as application/octet-stream."),
    "expires_after": ("supported", EXPIRY),
}
PART_FIELDS: Table = {"data": ("supported", "At most 64 MiB.")}
COMPLETE_FIELDS: Table = {
    "part_ids": ("supported", "In the order of the content."),
    "md5": ("supported", "Another sum is refused."),
}
FIELDS: dict[str, Table] = {
    "POST /v1/files": FILE_FIELDS,
    "POST /v1/uploads": UPLOAD_FIELDS,
    "POST /v1/uploads/{upload_id}/parts": PART_FIELDS,
    "POST /v1/uploads/{upload_id}/complete": COMPLETE_FIELDS,
    "POST /v1/fine_tuning/jobs": jobs.CREATE_FIELDS,
    "POST /v1/fine_tuning/checkpoints/{checkpoint}/permissions": permissions.CREATE_FIELDS,
    "POST /v1/luthier/aliases/{alias}": aliases.PROMOTE_FIELDS,
    "POST /v1/luthier/aliases/{alias}/rollback": aliases.ROLLBACK_FIELDS,
    "POST /v1/fine-tunes": legacy_wire.CREATE_FIELDS,
    "POST /v1/chat/completions": chat_wire.FIELDS,
    "POST /v1/completions": completions.FIELDS,
    "POST /v1/chat/completions/{completion_id}": {"metadata": ("supported", "Replaces what was there.")},
}


INTRODUCTION = """`supported` does what OpenAI's documentation says. `ignored` is accepted and changes nothing. \
`refused` is answered with an error that names the field. `null` is the same as absent. A field that is not listed is \
refused where something is made (uploads, jobs, permissions) and ignored by inference."""


def routers() -> Iterator[tuple[str, APIRouter]]:
    """(prefix, router) of everything that the app serves."""
    for router in ROUTERS:
        yield PREFIX, router
    yield "", health.router
    yield "", metrics.router


def routes() -> list[tuple[str, str, APIRoute]]:
    """(method, path, route), in the order in which they are served."""
    return [
        (method, (prefix + route.path).replace(":path}", "}"), route)
        for prefix, router in routers()
        for route in router.routes
        if isinstance(route, APIRoute)
        for method in sorted(route.methods or ())
    ]


def fields() -> dict[str, Table]:
    """Route -> its table, in the order of the routes."""
    there = [f"{method} {path}" for method, path, _ in routes()]
    return {route: FIELDS[route] for route in there if route in FIELDS}


def render() -> str:
    """The whole page."""
    lines = [
        "# Compatibility",
        "",
        "Written by `python -m luthier.api.compatibility` from the server's own tables; a test keeps it true.",
        "",
        INTRODUCTION,
        "",
        "## Routes",
        "",
        "| route | what it does | query |",
        "|---|---|---|",
        *(
            f"| `{method} {path}` | {route.summary or route.name} | {_query(route)} |"
            for method, path, route in routes()
        ),
        "| `GET /openapi.json` | This surface as an OpenAPI document | |",
        "",
        "Not served; the answer is a 404 with OpenAI's error object:",
        "",
        *_items(ELSEWHERE),
        "",
        "## Fields",
    ]
    for route, table in fields().items():
        lines += ["", f"### {route}", "", "| field | | |", "|---|---|---|"]
        lines += [f"| `{name}` | {state} | {_cell(reason)} |" for name, (state, reason) in table.items()]
    lines += ["", "## Choices", "", "Where the documentation is silent, or real clients contradict it:", ""]
    lines += _items(CHOICES)
    return "\n".join(lines) + "\n"


def _query(route: APIRoute) -> str:
    return ", ".join(f"`{parameter.alias}`" for parameter in route.dependant.query_params)


def _items(paragraphs: str) -> list[str]:
    return ["- " + " ".join(paragraph.split()) for paragraph in paragraphs.split("\n\n")]


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


if __name__ == "__main__":
    sys.stdout.write(render())
