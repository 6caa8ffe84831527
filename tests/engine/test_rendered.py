"""Rows that were kept are the rows that would be rendered; anything that decides them decides what is found."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from luthier.data import dataset
from luthier.data.dataset import Prepared
from luthier.data.render import Renderer
from luthier.engine import rendered
from luthier.settings import load_settings
from luthier.spec.errors import BadData


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LUTHIER_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(rendered, "LEAST", 0)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    lines = [
        {"messages": [{"role": "user", "content": f"ask {n}"}, {"role": "assistant", "content": "yes " * (n + 1)}]}
        for n in range(9)
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def same(left: Prepared, right: Prepared) -> bool:
    def told(found: Prepared) -> list[Any]:
        rows = found.rows
        account = {name: value for name, value in vars(found).items() if name != "rows"}
        return [
            account, rows.digest(), rows.places, rows.sides, rows.keys, rows.tokens, rows.supervised, rows.text,
            rows.pairs,
        ]  # fmt: skip

    return told(left) == told(right)


def entries() -> list[Path]:
    return sorted((load_settings().cache_dir / "rendered").glob("*"))


def test_kept_is_rendered(tiny: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows, order, prompts' keys and the account, with rows cut and dropped."""
    renderer = Renderer.load(tiny)
    options: dict[str, Any] = {"max_length": 24, "overlong": "truncate"}
    plain = dataset.prepare([str(data)], renderer, **options)
    first = rendered.prepare([str(data)], renderer, "base", **options)
    assert len(entries()) == 1 and plain.truncated + plain.dropped > 0
    monkeypatch.setattr(dataset, "prepare", lambda *_, **__: pytest.fail("rendered again"))
    told: list[tuple[int, int]] = []
    again = rendered.prepare([str(data)], renderer, "base", **options, progress=lambda *now: told.append(now))
    assert same(plain, first) and same(plain, again)
    assert told == [(data.stat().st_size, data.stat().st_size)]


def test_pairs_and_several_files_keep_their_places(tiny: Path, tmp_path: Path) -> None:
    paths = []
    for name in ("a", "b"):
        pairs = [{"prompt": f"{name} {n}", "chosen": "yes", "rejected": "no"} for n in range(3)]
        paths.append(tmp_path / f"{name}.jsonl")
        paths[-1].write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    found = [
        rendered.prepare(list(map(str, paths)), Renderer.load(tiny), "base", max_length=99, pairs=True) for _ in "12"
    ]
    assert same(*found) and found[0].rows.sides == 2
    assert found[1].rows.places[-1] == (1, 3) and found[1].rows.places[0] == (0, 1)


def test_what_decides_the_rows_decides_the_entry(tiny: Path, data: Path) -> None:
    plain = Renderer.load(tiny)

    def take(renderer: Renderer = plain, base: str = "base", **options: Any) -> None:
        rendered.prepare([str(data)], renderer, base, **{"max_length": 200, **options})

    take()
    take()
    assert len(entries()) == 1
    take(max_length=100, overlong="drop")
    take(max_length=100, overlong="truncate")
    take(base="another")
    take(Renderer.load(tiny, "plain"))
    take(Renderer.load(tiny, None, 0.5))
    data.write_text(data.read_text() + data.read_text().splitlines()[0] + "\n")
    take()
    assert len(entries()) == 7


def test_a_damaged_entry_is_rendered_again(tiny: Path, data: Path) -> None:
    renderer = Renderer.load(tiny)
    plain = rendered.prepare([str(data)], renderer, "base", max_length=200)
    [entry] = entries()
    whole = entry.read_bytes()
    middle = len(whole) // 3
    for wrong in (b"", whole[:-40], whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :], b"no archive"):
        entry.write_bytes(wrong)
        assert same(plain, rendered.prepare([str(data)], renderer, "base", max_length=200))
        assert entry.read_bytes() == whole or same(plain, rendered._load(entry))


def test_refusals_are_not_kept(tiny: Path, data: Path) -> None:
    data.write_text(data.read_text() + "{broken\n")
    for _ in range(2):
        with pytest.raises(BadData, match="line 10"):
            rendered.prepare([str(data)], Renderer.load(tiny), "base", max_length=200)
    assert not entries()


def test_the_oldest_go(tiny: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendered, "KEPT_FILES", 2)
    renderer = Renderer.load(tiny)
    for age, base in enumerate(("one", "two")):
        before = set(entries())
        rendered.prepare([str(data)], renderer, base, max_length=200)
        [new] = set(entries()) - before
        os.utime(new, (1000 + age, 1000 + age))
    for base in ("one", "three"):  # used again, so "two" is the oldest now
        rendered.prepare([str(data)], renderer, base, max_length=200)
    assert len(entries()) == 2
    monkeypatch.setattr(dataset, "prepare", lambda *_, **__: pytest.fail("rendered again"))
    for base in ("one", "three"):
        rendered.prepare([str(data)], renderer, base, max_length=200)


def test_small_data_leaves_nothing(tiny: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendered, "LEAST", 10**6)
    rendered.prepare([str(data)], Renderer.load(tiny), "base", max_length=200)
    assert not entries()
