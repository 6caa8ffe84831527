"""The data doctor's report through the API: the same as from the command line, kept by content, never waited for."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from luthier import cli
from luthier.api import checks
from luthier.api.services import Services
from luthier.data import checkup
from tests.data.test_doctor import row

ROWS = [row(n) for n in range(12)] + [row(3), row(20, "write to bob@firm.org")]
CONTENT = "".join(json.dumps(each) + "\n" for each in ROWS).encode()


def made(services: Services, content: bytes = CONTENT, name: str = "train.jsonl", purpose: str = "fine-tune") -> str:
    return services.files.create([content], filename=name, purpose=purpose).id


def ask(client: TestClient, file_id: str) -> Any:
    """The answer, once it is no 202."""
    deadline = time.monotonic() + 60
    while (answer := client.get(f"/v1/luthier/files/{file_id}/check")).status_code == 202:
        assert time.monotonic() < deadline
        assert answer.json() == {"object": "luthier.file.check", "file_id": file_id, "status": "in_progress"}
        assert answer.headers["retry-after"] == "2"
    return answer


def test_it_is_what_the_command_prints(
    client: TestClient,
    services: Services,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    answer = ask(client, made(services))
    assert answer.status_code == 200, answer.text
    monkeypatch.chdir(tmp_path)
    Path("train.jsonl").write_bytes(CONTENT)
    with pytest.raises(SystemExit):
        cli.main(["data", "check", "train.jsonl", "--json"])
    assert answer.json() == json.loads(capsys.readouterr().out)
    kinds = {found["kind"]: found["count"] for found in answer.json()["findings"]}
    assert kinds == {"duplicate": 1, "personal_data": 1}
    assert "bob@firm" not in answer.text


def test_content_is_looked_at_once(client: TestClient, services: Services, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = made(services), made(services)
    assert ask(client, first).status_code == 200
    monkeypatch.setattr(checkup, "command", lambda: ["/nowhere"])
    assert ask(client, second).json() == ask(client, first).json()
    (kept,) = (services.settings.home / "checks").iterdir()
    services.files.delete(first)
    assert kept.is_file()
    services.files.delete(second)
    assert not kept.exists()
    assert client.get(f"/v1/luthier/files/{first}/check").status_code == 404


def test_other_words_of_the_same_name_and_size(client: TestClient, services: Services) -> None:
    """B24: identity is content."""
    changed = CONTENT.replace(b"bob@firm.org", b"bob at a firm")[:-2] + b"\n"
    assert len(changed) == len(CONTENT)
    assert ask(client, made(services)).json() != ask(client, made(services, changed)).json()


def test_nobody_waits(client: TestClient, services: Services, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "PATIENCE", 0.0)
    answer = client.get(f"/v1/luthier/files/{made(services)}/check")
    assert (answer.status_code, answer.json()["status"]) == (202, "in_progress")


def test_what_cannot_be_looked_at_is_said(
    client: TestClient, services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkup, "command", lambda: ["sh", "-c", "exit 3"])
    file_id = made(services)
    for _ in range(2):  # it is not tried again
        answer = ask(client, file_id)
        error = answer.json()["error"]
        assert (answer.status_code, error["code"], error["param"]) == (400, "check_failed", "file_id")
        assert file_id in error["message"] and "exit code 3" in error["message"]
        monkeypatch.setattr(checkup, "command", lambda: ["sh", "-c", "exit 4"])


def test_too_many_wait(client: TestClient, services: Services, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "MOST_WAITING", 0)
    answer = client.get(f"/v1/luthier/files/{made(services)}/check")
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "60")


def test_other_files_and_none(client: TestClient, services: Services) -> None:
    batch = made(services, purpose="batch")
    assert client.get(f"/v1/luthier/files/{batch}/check").status_code == 400
    assert client.get("/v1/luthier/files/file-nothing/check").status_code == 404
    assert client.get("/v1/luthier/files/..%2f..%2fetc/check").status_code == 404
    assert client.get("/v1/luthier/files/x/check", headers={"Authorization": "Bearer no"}).status_code == 401


@pytest.mark.parametrize(
    ("filename", "name"),
    [
        ("train.jsonl", "train.jsonl"),
        ("../../my data (1).jsonl", "my data (1).jsonl"),
        ("C:\\rows\\train.txt", "train.txt.jsonl"),
        ("训练.jsonl", "训练.jsonl"),
        ("-rf.jsonl", "file.jsonl"),
        (".jsonl", "file.jsonl"),
        ("a\0b", "file.jsonl"),
        ("x" * 300, "file.jsonl"),
        ("..", "file.jsonl"),
        ("", "file.jsonl"),
    ],
)
def test_names_are_plain(filename: str, name: str) -> None:
    assert checkup.checked_name(filename) == name
