"""`luthier keep-general` as a person calls it, and its picture."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from luthier.cli.keep import WIDTH, picture
from luthier.proof import pareto, tradeoff
from luthier.spec.keeping import Keeping, Point
from luthier.spec.run import RunFolder
from tests.cli.calling import caller
from tests.engine.runs import chats, train, write


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny: Path) -> RunFolder:
    folder = tmp_path_factory.mktemp("keep")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LUTHIER_HOME", str(folder / "home"))
        data = write(folder / "train.jsonl", chats(16))
        held = write(folder / "held.jsonl", chats(12, 4))
        options = {"epochs": 2, "precision": "float32", "learning_rate": 1e-2, "proof_rows": 50, "metric": "text"}
        return train(folder / "run", tiny, data, validation=str(held), **options)


def test_the_search_is_shown_and_told_as_json(
    run: RunFolder, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LUTHIER_HOME", str(run.path.parent / "home"))
    keep = caller("keep-general", capsys)
    asked = (run.path, "--scales", "0.5,1", "--items", "20", "--rows", "4", "--by", "loss", "--keep", "0.5")
    code, out, err = keep(*asked, "--json")
    assert code == 0, err
    found = json.loads(out)
    assert [point["scale"] for point in found["points"]] == [0.0, 0.5, 1.0] and found["rows"] == 4
    assert found["by"] == "loss" and "keep 50% of the best gain" in found["rule"] and found["items"] < 113
    code, out, _ = keep(*asked)
    assert code == 0 and "base" in out and "Rule: " in out and "luthier report" in out
    code, out, _ = caller("report", capsys)(run.path)
    assert code == 0 and "chosen" in out and "scale:" in out


def test_what_cannot_be_asked_is_refused(
    run: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    keep = caller("keep-general", capsys)
    for scales in ("", "a", "0,1", "3", "nan"):
        code, _, err = keep(run.path, "--scales", scales)
        assert code == 2 and "wanted numbers over 0 and at most 2" in err
    code, _, err = keep(tmp_path)
    assert code == 2 and "is not a run folder" in err
    with run.owned():
        code, _, err = keep(run.path)
    assert code == 75 and "Another process is working" in err


def found(chosen: float = 0.5) -> Keeping:
    rows = ((0.0, 0.5, 0.0), (0.5, 0.88, 0.02), (1.0, 0.9, 0.1))
    points = [Point(scale=scale, score=score, loss=1.0, forgetting=lost) for scale, score, lost in rows]
    made = Keeping(
        method="scaled adapter", by="metric", metric="classification", rows=9, items=9, points=points, chosen=chosen,
        rule="", sentence="<b>said</b>",
    )  # fmt: skip
    for point, front in zip(points, tradeoff.front(points, tradeoff.gains(made)), strict=True):
        point.front = front
    return made


def test_the_picture_has_each_scale_in_its_place() -> None:
    lines = picture(found())
    assert lines[0].startswith("   0.900 | ") and lines[0].endswith(" 1")
    assert lines[8] == "   0.500 | base"
    row = next(line for line in lines if "*0.5" in line)
    assert row.index("*0.5") - 11 == round(0.2 * (WIDTH - 6))
    assert lines[-1].split() == ["+0.0%", "+10.0%", "forgotten"]
    assert all(len(line) <= 100 for line in lines)


def test_the_page_has_it_escaped_and_nothing_without_it() -> None:
    drawn = str(pareto.section(found()))
    assert drawn.count("<circle") == 3 and drawn.count('r="7"') == 1 and "&lt;b&gt;said" in drawn
    assert str(pareto.section(None)) == ""
