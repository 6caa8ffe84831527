"""A run with replayed rows that is stopped and resumed equals one that never was; proofs leave the rows out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from luthier.data import general
from luthier.engine.__main__ import carry_out
from luthier.engine.train import Loop
from luthier.spec.errors import BadSetting
from luthier.spec.job import make_request
from tests.engine.runs import chats, events, lay_out, refused, train, weights, write


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, str]:
    monkeypatch.setenv("LUTHIER_HOME", str(tmp_path / "home"))
    rows = write(tmp_path / "general.jsonl", chats(6, start=100))
    return write(tmp_path / "train.jsonl", chats(12)), str(rows)


def test_resumed_equals_uninterrupted(
    tmp_path: Path, tiny: Path, files: tuple[Path, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    data, rows = files
    options: dict[str, Any] = {
        "replay": 0.5, "replay_data": rows, "epochs": 2, "checkpoint_every": 1, "precision": "float32"
    }  # fmt: skip
    whole = train(tmp_path / "whole", tiny, data, **options)
    assert json.loads(whole.report.read_text())["replayed_rows"] == 6
    run = lay_out(tmp_path / "run", tiny, data, **options)
    record = Loop._record

    def ask(loop: Loop, *given: Any) -> None:
        record(loop, *given)
        if loop.step == 2:
            loop.run.ask_to_stop()

    with monkeypatch.context() as patched:
        patched.setattr(Loop, "_record", ask)
        assert carry_out(run) == 0
    assert events(run)[-1]["type"] == "stopped"
    assert carry_out(run) == 0
    mine, theirs = weights(run), weights(whole)
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


def test_a_proof_with_examples_shows_no_replayed_rows(tmp_path: Path, tiny: Path, files: tuple[Path, str]) -> None:
    data, rows = files
    run = train(
        tmp_path / "run", tiny, data, replay=1.0, replay_data=rows, validation="0.25", max_steps=2, proof_rows=2
    )
    report = json.loads(run.report.read_text())
    assert report["proof"] is not None, report["proof_note"]
    assert report["replayed_rows"] == 9


def test_without_a_file_rows_of_our_own_are_mixed_in(tmp_path: Path, tiny: Path, files: tuple[Path, str]) -> None:
    run = train(tmp_path / "run", tiny, files[0], replay=0.5, max_steps=2, max_length=512, proof_rows=0)
    assert json.loads(run.report.read_text())["replayed_rows"] == 6
    said = [event["message"] for event in events(run, "phase")]
    assert any(words.startswith(f"6 of {len(general.rows())} general rows are mixed in") for words in said), said
    with pytest.raises(BadSetting, match="replay_data needs replay"):
        make_request({"model": "m", "data": ["d"], "replay_data": files[1]})


def test_general_rows_that_cannot_be_read_are_refused_by_their_own_name(
    tmp_path: Path, tiny: Path, files: tuple[Path, str]
) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"what": 1}\n')
    failed = refused(tmp_path / "run", tiny, files[0], replay=0.5, replay_data=str(bad))
    assert (failed["param"], failed["problems"][0]["line"]) == ("replay_data", 1)
