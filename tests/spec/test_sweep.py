"""The arithmetic of a sweep: grids, rungs, who goes on."""

from __future__ import annotations

import itertools
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from luthier.spec.errors import BadSetting
from luthier.spec.job import make_request
from luthier.spec.sweep import GRID, Rung, Trial, combinations, command_words, plan, ranked, read_grid


@given(st.integers(1, 64), st.integers(1, 6))
def test_rungs_grow_to_the_whole_as_trials_are_left(trials: int, halving: int) -> None:
    rungs = plan(trials, halving)
    assert rungs[0][1] == trials and rungs[-1][0] == 1
    if halving == 1:
        assert rungs == [(Fraction(1), trials)]
        return
    assert rungs[-1][1] == 1
    for (share, count), (next_share, next_count) in itertools.pairwise(rungs):
        assert next_share == share * halving and next_count == max(1, count // halving) < count


@pytest.mark.parametrize("name", GRID)
def test_every_option_of_the_grid_takes_several_values(name: str) -> None:
    real = name == "beta" or name.startswith("learning_rate")
    others = {"model": "m", "data": ["d"], **({"objective": "dpo"} if name == "beta" else {})}
    shared, grid = read_grid({**others, name: "0.5, 0.25" if real else "2,4,2"})
    assert shared == others
    assert grid == {name: [0.5, 0.25] if real else [2, 4]}


def test_values_multiply_and_one_value_is_shared() -> None:
    shared, grid = read_grid({"model": "m", "data": ["d"], "rank": "4,8", "epochs": "1,2", "learning_rate": "1e-3"})
    assert shared["learning_rate"] == "1e-3"
    found = combinations(shared, grid)
    assert found == [{"rank": r, "epochs": e} for r in (4, 8) for e in (1, 2)]


def test_without_several_values_the_rate_is_tried() -> None:
    assert read_grid({"rank": "8"})[1] == {"learning_rate_multiplier": [0.3, 1.0, 3.0]}
    assert read_grid({"learning_rate_multiplier": "2"})[1] == {}


@pytest.mark.parametrize(
    ("given", "word"),
    [({"rank": "4,no"}, "rank"), ({"rank": "4,8", "method": "full"}, "rank"), ({"epochs": "0,1"}, "epochs")],
)
def test_a_value_that_no_run_can_have_is_refused(given: dict[str, str], word: str) -> None:
    def ask() -> None:
        combinations(*read_grid({"model": "m", "data": ["d"], **given}))

    with pytest.raises(BadSetting, match=word):
        ask()


def test_a_grid_has_its_bounds() -> None:
    with pytest.raises(BadSetting, match=r"81 trials \(9 x 9\)"):
        combinations({"model": "m", "data": ["d"]}, {"rank": list(range(1, 10)), "epochs": list(range(1, 10))})


def trial(number: int, loss: float | None, score: float | None = None, higher: bool | None = True) -> Trial:
    rung = Rung(share="1/3", step=1, steps=3, loss=loss, score=score, higher_is_better=higher)
    return Trial(number=number, values={}, run="", rungs=[rung])


def test_the_best_go_first_and_ties_keep_their_order() -> None:
    share = Fraction(1, 3)
    trials = [trial(1, 2.0, 0.5), trial(2, None), trial(3, 1.0, 0.4), trial(4, 1.5, 0.5), trial(5, 1.0, 0.1)]
    assert [each.number for each in ranked(trials, share, "loss")] == [3, 5, 4, 1, 2]
    assert [each.number for each in ranked(trials[:1] + trials[2:], share, "metric")] == [4, 1, 3, 5]
    lower = [trial(1, 1.0, 3.0, False), trial(2, 1.0, 2.0, False)]
    assert [each.number for each in ranked(lower, share, "metric")] == [2, 1]
    assert ranked([Trial(number=1, values={}, run="")], share, "loss") == []


def test_of_those_that_keep_the_gain_the_one_that_forgot_least_goes_first() -> None:
    figures = {1: (0.90, 0.30), 2: (0.89, 0.05), 3: (0.80, 0.00), 4: (0.885, 0.05), 5: (0.40, -0.10)}
    trials = []
    for number, (score, lost) in figures.items():
        one = trial(number, 1.0, score)
        one.rungs[0].base, one.rungs[0].forgetting = 0.5, lost
        trials.append(one)
    assert [each.number for each in ranked(trials, Fraction(1, 3), "metric")] == [2, 4, 1, 3, 5]
    for one in trials:
        one.rungs[0].base = 0.95  # nobody gains: by the score alone
    assert [each.number for each in ranked(trials, Fraction(1, 3), "metric")] == [1, 2, 4, 3, 5]


def test_the_command_pins_what_chance_and_the_machine_decided() -> None:
    request = make_request(
        {"model": "m", "data": ["a b", "c"], "rank": 4, "target_modules": ["q_proj", "v_proj"], "validation": "d"}
    )
    words = command_words(request, {"seed": 5, "micro_tokens": 512, "precision": "float32", "steps": 9}, "runs/x")
    assert words[:6] == ["luthier", "train", "--model", "m", "--data", "a b"]
    pairs = dict(zip(words[2::2], words[3::2], strict=True))
    assert pairs["--data"] == "c" and pairs["--target-modules"] == "q_proj,v_proj" and pairs["--out"] == "runs/x"
    assert (pairs["--seed"], pairs["--micro-tokens"], pairs["--precision"]) == ("5", "512", "float32")
    assert set(pairs) == {
        "--model", "--data", "--rank", "--target-modules", "--validation", "--seed", "--micro-tokens", "--precision",
        "--out",
    }  # fmt: skip
