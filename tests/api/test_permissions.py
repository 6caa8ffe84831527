"""Permissions on checkpoints."""

from __future__ import annotations

from fastapi.testclient import TestClient

from luthier.api.permissions import CREATE_FIELDS, PermissionRequest
from luthier.api.services import Services
from tests.api import driving

NAME = "ft:tiny:luthier:my-model:12345678:ckpt-step-4"
PATH = f"/v1/fine_tuning/checkpoints/{NAME}/permissions"


def test_create_list_and_delete(client: TestClient, services: Services) -> None:
    driving.register(services, NAME)
    made = client.post(PATH, json={"project_ids": ["proj_a", "proj_b"]}).json()
    assert (made["object"], made["has_more"]) == ("list", False)
    assert [one["project_id"] for one in made["data"]] == ["proj_a", "proj_b"]
    assert set(made["data"][0]) == {"id", "object", "created_at", "project_id"}
    assert made["data"][0]["object"] == "checkpoint.permission"
    again = client.post(PATH, json={"project_ids": ["proj_b", "proj_c"]}).json()
    assert again["data"][0] == made["data"][1]
    ids = [one["id"] for one in (*made["data"], again["data"][1])]
    listed = client.get(PATH.replace(":", "%3A")).json()
    assert [one["id"] for one in listed["data"]] == ids[::-1]
    assert (listed["first_id"], listed["last_id"]) == (ids[2], ids[0])
    page = client.get(PATH, params={"order": "ascending", "limit": 2}).json()
    assert [one["id"] for one in page["data"]] == ids[:2]
    assert page["has_more"] is True
    rest = client.get(PATH, params={"order": "ascending", "after": page["last_id"]}).json()
    assert [one["id"] for one in rest["data"]] == ids[2:]
    mine = client.get(PATH, params={"project_id": "proj_b"}).json()
    assert [one["id"] for one in mine["data"]] == [ids[1]]
    gone = client.delete(f"{PATH}/{ids[0]}").json()
    assert gone == {"id": ids[0], "object": "checkpoint.permission", "deleted": True}
    assert client.delete(f"{PATH}/{ids[0]}").json()["error"]["param"] == "permission_id"
    assert len(client.get(PATH).json()["data"]) == 2


def test_what_is_refused(client: TestClient, services: Services) -> None:
    for name in (NAME, "tiny", "..%2F..%2Fetc", "%00"):
        for answer in (
            client.get(f"/v1/fine_tuning/checkpoints/{name}/permissions"),
            client.post(f"/v1/fine_tuning/checkpoints/{name}/permissions", json={"project_ids": ["p"]}),
            client.delete(f"/v1/fine_tuning/checkpoints/{name}/permissions/cp_{'x' * 24}"),
        ):
            assert answer.status_code == 404, name
    driving.register(services, NAME)
    for asked in ({}, {"project_ids": []}, {"project_ids": ["a/b"]}, {"project_ids": "a"}, {"projects": ["a"]}):
        assert client.post(PATH, json=asked).status_code == 400
    assert client.get(PATH, params={"order": "up"}).json()["error"]["param"] == "order"


def test_the_papers_tell_of_every_field() -> None:
    assert set(CREATE_FIELDS) == set(PermissionRequest.model_fields)
