"""Mixing files: the shares that were asked for, every repeat counted, the same mix for the same seed."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from luthier.data.mix import Source, mix, parse_source, read_losses, shares
from luthier.data.rows import said
from luthier.spec.errors import BadData, BadSetting
from tests.data.test_shared_data import shared


def write(path: Path, name: str, count: int) -> Path:
    lines = [json.dumps({"prompt": f"{name}{n}", "completion": "x" * (count - n)}) for n in range(count)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture
def two(tmp_path: Path) -> tuple[Path, Path]:
    return write(tmp_path / "a.jsonl", "a", 20), write(tmp_path / "b.jsonl", "b", 10)


def taken(out: Path) -> Counter[str]:
    return Counter(json.loads(line)["prompt"] for line in out.read_text("utf-8").splitlines())


@given(
    counts=st.lists(st.integers(1, 1000), min_size=1, max_size=5),
    weights=st.lists(st.floats(0.01, 100), min_size=5, max_size=5),
    rows=st.none() | st.integers(1, 5000),
)
def test_shares_are_exact(counts: list[int], weights: list[float], rows: int | None) -> None:
    weights = weights[: len(counts)]
    given_rows = shares(counts, weights, rows)
    if rows is None:  # nothing is repeated, and one source is used up
        assert all(mine <= count for mine, count in zip(given_rows, counts, strict=True))
        assert any(mine == count for mine, count in zip(given_rows, counts, strict=True))
    else:
        assert sum(given_rows) == rows
    scale = sum(given_rows) / sum(weights)
    for mine, weight in zip(given_rows, weights, strict=True):
        assert abs(mine - weight * scale) < len(counts) + 1


def test_nothing_is_repeated_unasked(two: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    done = mix([Source(two[0], 0.7), Source(two[1], 0.3)], out)
    assert [(each.rows, each.taken, each.distinct, each.repeated) for each in done.sources] == [
        (20, 20, 20, 0),
        (10, 8, 8, 0),
    ]
    assert done.rows == 28 and set(taken(out).values()) == {1}
    lines = out.read_bytes().splitlines()
    assert set(lines) <= set(two[0].read_bytes().splitlines() + two[1].read_bytes().splitlines())


def test_repeats_are_even_and_counted(two: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    done = mix([Source(two[0]), Source(two[1])], out, rows=50)
    assert [(each.taken, each.distinct, each.repeated) for each in done.sources] == [(25, 20, 5), (25, 10, 15)]
    counted = taken(out)
    assert sorted(counted[f"a{n}"] for n in range(20)) == [1] * 15 + [2] * 5
    assert sorted(counted[f"b{n}"] for n in range(10)) == [2] * 5 + [3] * 5


def test_the_seed_decides(two: tuple[Path, Path], tmp_path: Path) -> None:
    def mixed(seed: int) -> bytes:
        mix([Source(path) for path in two], tmp_path / "out.jsonl", rows=12, seed=seed, force=True)
        return (tmp_path / "out.jsonl").read_bytes()

    assert mixed(1) == mixed(1) != mixed(2)


def test_easy_rows_first(two: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    hard = lambda file, row, meaning: len(said(meaning))  # noqa: E731
    mix([Source(path) for path in two], out, rows=30, order="easy-to-hard", difficulty=hard)
    lengths = [len(row["prompt"] + row["completion"]) for row in map(json.loads, out.read_text().splitlines())]
    assert lengths == sorted(lengths) and len(lengths) == 30


def test_losses_order_rows(two: tuple[Path, Path], tmp_path: Path) -> None:
    losses = tmp_path / "losses.jsonl"
    rows = [{"file": "a.jsonl", "row": n, "loss": -n} for n in range(1, 21)]
    rows += [{"file": str(two[1]), "row": n, "loss": 100 + n / 2} for n in range(1, 11)]
    losses.write_text("\n".join(map(json.dumps, rows)))
    sources = [Source(two[0], 2), Source(two[1], 1)]
    out = tmp_path / "out.jsonl"
    mix(sources, out, rows=30, order="easy-to-hard", difficulty=read_losses(losses, sources))
    order = [json.loads(line)["prompt"] for line in out.read_text().splitlines()]
    assert order == [f"a{n}" for n in range(19, -1, -1)] + [f"b{n}" for n in range(10)]


@pytest.mark.parametrize(
    ("line", "field", "found"),
    [
        ({"row": 1, "loss": 1}, "file", "null"),
        ({"file": "c.jsonl", "row": 1, "loss": 1}, "file", "'c.jsonl'"),
        ({"file": "a.jsonl", "row": 0, "loss": 1}, "row", "0"),
        ({"file": "a.jsonl", "row": True, "loss": 1}, "row", "true"),
        ({"file": "a.jsonl", "row": 1, "loss": "1"}, "loss", "'1'"),
        ({"file": "a.jsonl", "row": 1, "loss": True}, "loss", "true"),
        ([], "file", "null"),
    ],
)
def test_losses_are_checked(two: tuple[Path, Path], tmp_path: Path, line: Any, field: str, found: str) -> None:
    losses = tmp_path / "losses.jsonl"
    losses.write_text(json.dumps(line) if isinstance(line, dict) else json.dumps({"x": line}))
    with pytest.raises(BadData) as refusal:
        read_losses(losses, [Source(path) for path in two])
    (problem,) = refusal.value.problems
    assert (problem.line, problem.field, problem.found, problem.file) == (1, field, found, "losses.jsonl")


def test_every_row_needs_one_loss(two: tuple[Path, Path], tmp_path: Path) -> None:
    losses = tmp_path / "losses.jsonl"
    sources = [Source(two[1])]
    losses.write_text(json.dumps({"row": 1, "loss": 0.5}) + "\n")
    with pytest.raises(BadData, match="no loss for row 2"):
        mix(sources, tmp_path / "o.jsonl", order="easy-to-hard", difficulty=read_losses(losses, sources))
    losses.write_text((json.dumps({"row": 1, "loss": 0.5}) + "\n") * 2)
    with pytest.raises(BadData, match="one loss a row"):
        read_losses(losses, sources)


def test_formats_do_not_mix(two: tuple[Path, Path], tmp_path: Path) -> None:
    other = tmp_path / "t.jsonl"
    other.write_text('{"text": "a"}\n')
    with pytest.raises(BadData, match="holds text records") as refusal:
        mix([Source(two[0]), Source(other)], tmp_path / "o.jsonl")
    assert "convert" in (refusal.value.hint or "") and "--to completion" in (refusal.value.hint or "")
    assert not (tmp_path / "o.jsonl").exists()


def test_each_source_gives_something(two: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(BadData, match=r"b.jsonl would give none of the 10 rows: its weight is 0.01"):
        mix([Source(two[0]), Source(two[1], 0.01)], tmp_path / "o.jsonl", rows=10)
    with pytest.raises(BadSetting, match="named twice"):
        mix([Source(two[0]), Source(two[0])], tmp_path / "o.jsonl")


def test_sources_are_named_with_their_weights(tmp_path: Path) -> None:
    assert parse_source("a.jsonl:0.7") == Source(Path("a.jsonl"), 0.7)
    assert parse_source("a.jsonl") == Source(Path("a.jsonl"), 1.0)
    assert parse_source("c:d") == Source(Path("c:d"), 1.0)
    odd = tmp_path / "x:2"
    odd.write_text("")
    assert parse_source(str(odd)) == Source(odd, 1.0)
    for wrong in ("0", "-1", "nan", "inf"):
        with pytest.raises(BadSetting, match="above 0"):
            parse_source(f"a.jsonl:{wrong}")


def test_arrays_become_lines(tmp_path: Path) -> None:
    source = tmp_path / "a.json"
    source.write_text(json.dumps([{"prompt": "a", "completion": "\n é"}], indent=2))
    mix([Source(source)], tmp_path / "o.jsonl")
    assert (tmp_path / "o.jsonl").read_text("utf-8") == '{"prompt": "a", "completion": "\\n \\u00e9"}\n'.replace(
        "\\u00e9", "é"
    )


def test_real_files(tmp_path: Path) -> None:
    sources = [
        Source(shared(f"llama_factory/{name}.json"), weight)
        for name, weight in (("alpaca_en_demo", 3), ("identity", 1))
    ]
    done = mix(sources, tmp_path / "o.jsonl", rows=1000)
    assert [(each.rows, each.taken, each.repeated) for each in done.sources] == [(999, 750, 0), (91, 250, 159)]
    assert mix(sources, tmp_path / "p.jsonl").rows == 273 + 91
