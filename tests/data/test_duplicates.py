"""Same and almost the same: sketches estimate what they claim to, and whoever is found resembles an earlier row."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from luthier.data.duplicates import ALIKE, SHINGLE, alike, earlier_alike, identity, sketch
from luthier.spec.data import Chat, Completion, Message, Text, ToolCall


def runs(text: str) -> set[str]:
    text = " ".join(text.lower().split())
    return {text[n : n + SHINGLE] for n in range(max(1, len(text) - SHINGLE + 1))}


def true_share(one: str, other: str) -> float:
    return len(runs(one) & runs(other)) / len(runs(one) | runs(other))


def words(count: int, seed: int) -> list[str]:
    drawn = random.Random(seed)
    return ["".join(drawn.choices("abcdefghijklmnop", k=drawn.randint(2, 9))) for _ in range(count)]


def changed(text: list[str], count: int, seed: int) -> str:
    places = set(random.Random(seed).sample(range(len(text)), count))
    return " ".join("zzz" if n in places else word for n, word in enumerate(text))


@pytest.mark.parametrize("length", [40, 200, 2000])
def test_the_share_is_estimated_without_bias(length: int) -> None:
    errors = []
    for seed in range(60):
        text = words(length, seed)
        other = text[: -(length // 4) - seed % 5] + words(length // 8, seed + 1000)
        one, two = " ".join(text), " ".join(other)
        errors.append(alike(sketch(one)[0], sketch(two)[0]) - true_share(one, two))
    assert abs(float(np.mean(errors))) < 0.02
    assert float(np.std(errors)) < 0.07


def test_other_texts_share_nothing() -> None:
    shares = [alike(sketch(" ".join(words(300, n)))[0], sketch(" ".join(words(300, n + 500)))[0]) for n in range(50)]
    assert max(shares) < 0.1
    long = "".join(random.Random(1).choices("abcdefghijklmnopqrstuvwxyz ", k=400_000))
    other = "".join(random.Random(2).choices("abcdefghijklmnopqrstuvwxyz ", k=400_000))
    assert alike(sketch(long)[0], sketch(other)[0]) < 0.2


@given(st.text(max_size=300))
def test_capitals_and_space_make_no_difference(text: str) -> None:
    ascii_text = text.encode("ascii", "ignore").decode()
    same = alike(sketch(ascii_text)[0], sketch("  " + ascii_text.upper().replace(" ", "\n ") + "\n")[0])
    assert same == 1.0
    assert 0 < sketch(text)[1] <= 1


def test_repetition_shows() -> None:
    assert sketch("ha " * 1000)[1] < 0.01
    assert sketch(" ".join(words(300, 3)))[1] > 0.9


def test_near_rows_are_found_among_many() -> None:
    texts = [" ".join(words(40, n)) for n in range(400)]
    texts += [changed(words(40, n), 1, n) for n in range(0, 400, 10)]
    found = earlier_alike(np.stack([sketch(text)[0] for text in texts]))
    assert found[:400].tolist() == [-1] * 400
    assert all(earlier in (-1, 10 * n) for n, earlier in enumerate(found[400:]))
    assert np.count_nonzero(found >= 0) >= 38  # one word in forty is near the threshold


def test_whoever_is_found_resembles_an_earlier_row() -> None:
    drawn = random.Random(0)
    base = words(30, 0)
    sketches = np.stack([sketch(changed(base, drawn.randint(0, 6), n))[0] for n in range(200)])
    found = earlier_alike(sketches)
    assert found[0] == -1
    for row in np.flatnonzero(found >= 0):
        assert found[row] < row
        assert alike(sketches[row], sketches[found[row]]) >= ALIKE


def test_the_boundary_compares_across_it_alone() -> None:
    texts = [" ".join(words(40, n)) for n in (0, 1, 0, 2, 2, 0, 3)]
    sketches = np.stack([sketch(text)[0] for text in texts])
    assert earlier_alike(sketches).tolist() == [-1, -1, 0, -1, 3, 0, -1]
    found = earlier_alike(sketches, boundary=3)
    assert (found >= 0).tolist() == [False, False, False, False, False, True, False]
    assert earlier_alike(sketches[:0]).tolist() == []


def test_what_makes_rows_the_same() -> None:
    user, answer = Message("user", "q"), Message("assistant", "a")
    row = identity(Chat((user, answer), line=1, row=1))
    assert identity(Chat((user, answer), line=9, row=9)) == row
    other = identity(Chat((user, Message("assistant", "b"))))
    assert other.prompt == row.prompt and other.answer != row.answer
    told = identity(Chat((Message("system", "s"), user, answer)))
    assert told.prompt != row.prompt and told.answer == row.answer and told.text == row.text
    tool = {"type": "function", "function": {"name": "f"}}
    assert identity(Chat((user, answer), (tool,))).prompt != row.prompt
    one, two = (
        identity(Chat((user, Message("assistant", "", tool_calls=(ToolCall("f", {"x": x}, f"id{x}"),)))))
        for x in (1, 2)
    )
    assert one.prompt == two.prompt and one.answer != two.answer
    assert identity(Completion("ab", "c")) != identity(Completion("a", "bc"))
    assert identity(Text("ab")) == identity(Text("ab", False))


def test_the_last_learnt_answer_is_the_answer() -> None:
    user, answer = Message("user", "q"), Message("assistant", "a")
    long = identity(Chat((user, answer, user, Message("assistant", "b"))))
    short = identity(Chat((user, answer, user, Message("assistant", "c"))))
    assert long.prompt == short.prompt and long.answer != short.answer
