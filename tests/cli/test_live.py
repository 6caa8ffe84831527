"""What is shown of a run: the account of its events, the curve, the live view at several sizes, the plain lines."""

from __future__ import annotations

import io
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from luthier.cli.chart import loss_chart
from luthier.cli.live import MOST_POINTS, Account, LiveView, PlainView, plan_words, summary
from luthier.cli.output import duration, plural, size, visible
from tests.cli.fake_engine import REPORT

REQUEST = {"model": "smollm2-135m-instruct", "method": "lora"}
SETTINGS = {"batch_size": 16, "epochs": 3, "learning_rate": 1.2e-3, "seed": 7}
PREPARED = {
    "type": "prepared", "rows": 540, "train_rows": 486, "validation_rows": 54, "tokens": 45_000, "dropped": 0,
    "supervised_tokens": 12_345, "physical_tokens": 30_000, "tree_ratio": 1.5, "truncated": 0, "steps": 100,
    "settings": SETTINGS,
}  # fmt: skip


def step(number: int, loss: float = 1.0, **more: Any) -> dict[str, Any]:
    return {
        "type": "step", "step": number, "steps": 100, "epoch": 0.5, "loss": loss, "learning_rate": 1e-3,
        "grad_norm": 1.0, "tokens": 300, "supervised_tokens": 60, "seconds": 0.5, "memory_bytes": 1_250_000_000,
        "eta_seconds": 60.0, **more,
    }  # fmt: skip


def validation(number: int, loss: float = 1.5) -> dict[str, Any]:
    return {"type": "validation", "step": number, "loss": loss, "token_accuracy": 0.5, "supervised_tokens": 10}


STORY = [
    {"type": "started", "resumed_from": None},
    {"type": "phase", "name": "load", "message": "Loading smollm2"},
    {
        "type": "phase",
        "name": "data",
        "message": "Reading /a/very/long/path/that/goes/on/and/on/for/ever/and/a/day/data.jsonl",
    },
    {"type": "progress", "name": "data", "done": 50, "total": 100},
    PREPARED,
    {"type": "warning", "message": "Something is odd.", "hint": "Look at it."},
    {"type": "phase", "name": "train", "message": "Training"},
    *[step(number, 3 / number) for number in range(1, 41)],
    validation(40),
    {"type": "checkpoint", "step": 40, "path": "x", "best": True},
    step(41, 0.5),
]


# -- the account -------------------------------------------------------------------------------------------------------


def test_rates_are_tokens_over_seconds() -> None:
    account = Account(REQUEST)
    account.see(step(1))
    account.see(step(2, tokens=900, supervised_tokens=180))
    assert account.rate("tokens") == pytest.approx(1200)
    assert account.rate("supervised_tokens") == pytest.approx(240)


def test_the_curve_starts_at_the_first_loss_and_is_smooth() -> None:
    account = Account(REQUEST)
    for number, loss in enumerate((4.0, 2.0, 2.0), 1):
        account.see(step(number, loss))
    assert account.curve[0] == (1.0, pytest.approx(4.0))
    assert account.curve[1] == (2.0, pytest.approx((0.8 * 0.2 * 4 + 0.2 * 2) / (0.8 * 0.2 + 0.2)))
    assert 2.0 < account.curve[2][1] < account.curve[1][1]


def test_a_resumed_run_forgets_what_will_be_done_again() -> None:
    account = Account(REQUEST)
    for number in range(1, 31):
        account.see(step(number))
    account.see(validation(10))
    account.see(validation(30))
    account.see({"type": "started", "resumed_from": 20})
    assert [x for x, _ in account.curve] == list(range(1, 21))
    assert [x for x, _ in account.validations] == [10]
    account.see({"type": "started", "resumed_from": None})
    assert account.curve == []


def test_a_long_curve_stays_small() -> None:
    account = Account(REQUEST)
    for number in range(1, 3 * MOST_POINTS):
        account.see(step(number))
    assert MOST_POINTS // 2 <= len(account.curve) <= MOST_POINTS
    assert account.curve[-1][0] > 2.9 * MOST_POINTS


# -- the curve ---------------------------------------------------------------------------------------------------------

points = st.lists(st.tuples(st.integers(0, 10_000), st.floats(0, 50)), max_size=60).map(
    lambda found: [(float(x), y) for x, y in sorted(found)]
)


@given(points, points, st.integers(0, 120), st.integers(0, 20), st.booleans())
@settings(max_examples=60, deadline=None)
def test_a_chart_fits_its_room(
    curve: list[tuple[float, float]], marks: list[tuple[float, float]], width: int, height: int, ascii_only: bool
) -> None:
    lines = loss_chart(curve, marks, width, height, ascii_only)
    assert len(lines) in (0, height)
    assert all(line.cell_len <= width for line in lines)
    assert not ascii_only or all(line.plain.isascii() for line in lines)


def test_a_falling_loss_falls() -> None:
    lines = [line.plain for line in loss_chart([(0, 2.0), (9, 1.0)], [], 17, 5, ascii_only=True)]
    assert lines == [
        " 2.03| **        ",
        "     |   ***     ",
        "     |      ***  ",
        " 0.97|         **",
        "       step 0   9",
    ]


def test_validation_points_stand_over_the_curve() -> None:
    lines = [line.plain for line in loss_chart([(0, 2.0), (9, 1.0)], [(9, 2.0)], 60, 5, ascii_only=True)]
    assert lines[0].rstrip().endswith("o")
    assert "validation" in lines[-1]


# -- the live view -----------------------------------------------------------------------------------------------------


def drawn(width: int, height: int, events: list[dict[str, Any]], note: str = "", **options: Any) -> str:
    """The live view's last picture, as text with its escape codes."""
    terminal = Console(file=io.StringIO(), force_terminal=True, width=width, height=height, **options)
    view = LiveView(terminal, REQUEST, "runs/x")
    for event in events:
        view.account.see(event)
    view.note = note
    with terminal.capture() as captured:
        terminal.print(view._live.renderable)
    return captured.get()


@pytest.mark.parametrize(
    "story", [STORY[:1], STORY[:4], STORY[:8], STORY], ids=["start", "data", "first step", "later"]
)
@pytest.mark.parametrize(("width", "height"), [(100, 30), (60, 20), (34, 12), (200, 60), (20, 6)])
def test_the_picture_fits_the_terminal(width: int, height: int, story: list[dict[str, Any]]) -> None:
    lines = drawn(width, height, story, note="Stopping after this step.", no_color=True).splitlines()
    assert len(lines) <= max(height, 8)
    assert all(len(_bare(line)) <= width for line in lines)


def _bare(line: str) -> str:
    from rich.text import Text

    return Text.from_ansi(line).plain


def test_the_picture_tells_what_matters() -> None:
    text = "\n".join(map(_bare, drawn(100, 30, STORY, color_system=None).splitlines()))
    for words in (
        "smollm2-135m-instruct", "lora", "486 rows", "step 41 of 100", "41%", "1:00 left", "0.5000", "1.5000",
        "50.0%", "1.00e-03", "600", "120", "1.25 GB", "40 (best)", "●",
    ):  # fmt: skip
        assert words in text, words


def test_no_colour_means_no_colour() -> None:
    import re

    codes = {
        code
        for found in re.findall(r"\x1b\[([\d;]*)m", drawn(80, 24, STORY, no_color=True))
        for code in found.split(";")
    }
    assert codes <= {"0", "1", "2", ""}


def test_an_ascii_terminal_gets_ascii() -> None:
    raw = io.BytesIO()
    terminal = Console(
        file=io.TextIOWrapper(raw, encoding="ascii", errors="replace"), force_terminal=True, width=80, height=24
    )
    with LiveView(terminal, REQUEST, "runs/x") as view:
        for event in STORY:
            view.see(event)
            view.tick()
    terminal.file.flush()
    picture = _bare(raw.getvalue().decode("ascii"))
    assert "step 41 of 100" in picture
    assert "* train  o validation" in picture


def test_before_the_first_step_phases_are_listed() -> None:
    text = _bare(drawn(60, 20, STORY[:4], color_system=None))
    assert "✓ Loading smollm2" in text
    assert "Reading /a/very" in text


# -- plain lines -------------------------------------------------------------------------------------------------------


FORECAST = {
    "type": "forecast", "seconds": 75.2, "peak_memory_bytes": 1_250_000_000, "disk_bytes": 80_000_000,
    "load_seconds": 5.2, "train_seconds": 40.0, "validate_seconds": 8.0, "save_seconds": 2.0, "prove_seconds": 13.0,
    "curve_seconds": 0.0, "forget_seconds": 7.0, "probe_items": 60, "rows": 8, "dropped": 0, "truncated": 0,
    "lost_tokens": 0, "tokens": 80, "supervised_tokens": 8, "tree_ratio": None, "epochs": 1, "steps": 2,
    "micro_batches": 2, "memory_bytes": None, "free_disk_bytes": 10**10, "measured": True,
}  # fmt: skip


def test_the_forecast_is_said_before_and_after(capsys: pytest.CaptureFixture[str]) -> None:
    words = "Forecast: 1:15 in all, at most 1.25 GB of memory and 80 MB of disk"
    view = PlainView({"model": "m"}, "runs/x")
    view.see({"type": "phase", "name": "forecast", "message": "Measuring"})
    view.see(FORECAST)
    assert capsys.readouterr().out.splitlines() == ["Measuring.", f"{words}."]
    assert view.account.phases == [words]
    told = {name: value for name, value in FORECAST.items() if name not in ("type", "seconds")}
    parts = [
        {"name": "training", "foretold": 40.0, "seconds": 44.0, "share": 1.0},
        {"name": "proof", "foretold": 13.0, "seconds": 11.0, "share": 0.25},
        {"name": "forgetting", "foretold": None, "seconds": 66.0, "share": 1.5},
    ]
    lines = summary({**REPORT, "forecast": told, "parts": parts}, "m")
    assert ("foretold", "1:15, at most 1.25 GB") in lines
    assert ("training", "0:44; foretold 0:40") in lines
    assert ("proof", "0:11; foretold 0:13; 25% of the training's time") in lines
    assert ("forgetting", "1:06; 150% of the training's time") in lines


def test_plain_lines_are_few(capsys: pytest.CaptureFixture[str]) -> None:
    with PlainView(REQUEST, "runs/x") as view:
        for event in STORY[:7]:
            view.see(event)
        for number in range(1, 1001):
            view.see(step(number, steps=1000))
        view.see({"type": "checkpoint", "step": 1000, "best": False})
    lines = capsys.readouterr().out.splitlines()
    steps = [line for line in lines if line.startswith("step ")]
    assert 20 <= len(steps) <= 21
    assert steps[-1].startswith("step 1000/1000: loss 1.0000, learning rate 1.00e-03, 600 tokens/s")
    assert lines[0] == "Run runs/x: smollm2-135m-instruct, lora"
    assert "Warning: Something is odd. Look at it." in lines
    assert lines[-1] == "checkpoint at step 1000"


def test_of_pairs_it_tells_how_many_are_right(capsys: pytest.CaptureFixture[str]) -> None:
    chosen = {"reward_accuracy": 0.875, "reward_margin": 1.25, "preference_accuracy": 0.625}
    held = {**validation(40), "token_accuracy": None, "preference": chosen}
    text = drawn(100, 30, [*STORY[:-2], held, step(41, 0.5, preference=chosen)], color_system=None)
    assert "pairs right" in text and "62.5%" in text and "reward margin" in text and "1.250" in text
    assert "token accuracy" not in text
    with PlainView(REQUEST, "runs/x") as view:
        view.see(held)
    assert "validation at step 40: loss 1.5000, pairs right 62.5%" in capsys.readouterr().out
    scores = {"base": {"preference_accuracy": 0.5}, "tuned": {"preference_accuracy": 0.75}}
    assert dict(summary({**REPORT, **scores}, "/m"))["pairs right"] == "50.0% (base) -> 75.0% (tuned)"


def test_the_plan_in_words() -> None:
    assert plan_words(PREPARED) == (
        "486 rows to train on and 54 held out; 45,000 tokens, 12,345 learnt, shared prefixes save a factor of 1.50. "
        "100 steps of 16 rows, 3 epochs, learning rate 0.0012, seed 7."
    )
    pairs = plan_words({**PREPARED, "settings": {**PREPARED["settings"], "beta": 0.1}})
    assert pairs.startswith("486 pairs to train on") and "100 steps of 16 pairs" in pairs


def test_the_summary_tells_before_and_after() -> None:
    lines = dict(summary(REPORT, "/somewhere/model"))
    assert lines["training loss"] == "3.2000 -> 0.4000"
    assert lines["validation loss"] == "2.5000 (base) -> 0.5000 (tuned)"
    assert lines["token accuracy"] == "41.0% (base) -> 91.0% (tuned)"
    assert "exact match" not in lines
    assert lines["computed"] == "60,000; shared prefixes save a factor of 2.00"
    assert lines["time"] == "1:15, at most 1.25 GB of memory"
    bare = dict(summary({**REPORT, "base": None, "tuned": None, "tree_ratio": 1.0, "peak_memory_bytes": None}, "/m"))
    assert set(bare) == {"training loss", "tokens", "time", "model"}


@pytest.mark.parametrize(("seconds", "words"), [(0, "0:00"), (75.2, "1:15"), (3700, "1:01:40"), (-3, "0:00")])
def test_durations(seconds: float, words: str) -> None:
    assert duration(seconds) == words


def test_sizes_and_plurals() -> None:
    assert [size(n) for n in (999, 1_250_000, 3e9, 4e12)] == ["999 B", "1.25 MB", "3 GB", "4 TB"]
    assert (plural(1, "row"), plural(1200, "row")) == ("1 row", "1,200 rows")


@given(st.text())
def test_visible_text_has_no_control_characters(text: str) -> None:
    assert all(ord(found) >= 32 or found in "\n\t" for found in visible(text))
