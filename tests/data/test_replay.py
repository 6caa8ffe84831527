"""Replay draws as many general rows as were asked for, by the seed alone, and changes nothing of the training rows."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from luthier.data.dataset import Rows
from luthier.data.replay import ELSEWHERE, mix


def rows(count: int, first: int) -> Rows:
    made = Rows()
    for n in range(count):
        made.add([first + n, 1], [0.0, 1.0], n + 1, bytes([n]))
    return made


@given(st.integers(1, 40), st.integers(1, 20), st.floats(0, 3), st.integers(0, 9))
def test_the_training_rows_come_first_and_the_rest_is_drawn_evenly(
    count: int, there: int, share: float, seed: int
) -> None:
    train, general = rows(count, 100), rows(there, 500)
    mixed, added = mix(train, general, share, seed)
    assert (len(mixed), added) == (count + round(share * count), round(share * count))
    assert [mixed[n][0].tolist() for n in range(count)] == [train[n][0].tolist() for n in range(count)]
    assert mixed.places[:count] == train.places
    drawn = [int(mixed[n][0][0]) - 500 for n in range(count, len(mixed))]
    times = [drawn.count(n) for n in range(there)]
    assert max(times) - min(times) <= 1
    assert all(place == (ELSEWHERE, n + 1) for place, n in zip(mixed.places[count:], drawn, strict=True))
    again, _ = mix(train, general, share, seed)
    assert again.digest() == mixed.digest()


def test_another_seed_draws_others() -> None:
    train, general = rows(20, 100), rows(200, 500)
    assert mix(train, general, 1.0, 1)[0].digest() != mix(train, general, 1.0, 2)[0].digest()
