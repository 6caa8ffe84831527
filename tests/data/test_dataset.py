"""Files to rows: nothing lost uncounted, windows exact, splits without leaks."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from luthier.data.dataset import Rows, prepare, split, windows
from luthier.data.render import Renderer
from luthier.spec.data import Rendered
from luthier.spec.errors import BadData, NotFound
from tests import tiny as tiny_models


@pytest.fixture(scope="module")
def renderer(tmp_path_factory: pytest.TempPathFactory) -> Renderer:
    return Renderer.load(tiny_models.make_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def chat(question: str, answer: str) -> str:
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return json.dumps({"messages": turns})


@given(st.integers(2, 80), st.integers(2, 20), st.booleans())
def test_windows_learn_every_token_once(length: int, size: int, opens: bool) -> None:
    """Each window fits, and predicts from its own tokens; together they predict every token but the first."""
    row = Rendered(list(range(100, 100 + length)), [0.0] + [0.0 if opens else 1.0] + [1.0] * (length - 2))
    pieces = windows(row, size)
    assert all(2 <= len(piece.ids) <= size and piece.weights[0] == 0 for piece in pieces)
    learnt = [token for piece in pieces for token, weight in zip(piece.ids, piece.weights, strict=True) if weight]
    assert learnt == [token for token, weight in zip(row.ids, row.weights, strict=True) if weight]
    for before, after in itertools.pairwise(pieces):
        assert before.ids[-1] == after.ids[0]


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 3)), min_size=2, max_size=60), st.floats(0.05, 0.95))
def test_splits_keep_prompts_apart(pairs: list[tuple[int, int]], share: float) -> None:
    rows = Rows()
    for n, (prompt, answer) in enumerate(pairs):
        rows.add([prompt, 9, answer], [0.0, 0.0, 1.0], n, bytes([prompt]))
    if len({prompt for prompt, _ in pairs}) < 2:
        with pytest.raises(BadData, match="two distinct prompts"):
            split(rows, share, 3)
        return
    train, held = split(rows, share, 3)
    assert len(train) and len(held) and len(train) + len(held) == len(rows)
    assert not {int(ids[0]) for ids, _ in train} & {int(ids[0]) for ids, _ in held}
    assert sorted(train.sources + held.sources) == list(range(len(pairs)))
    again = split(rows, share, 3)
    assert again[0].digest() == train.digest() and again[1].sources == held.sources


def test_a_split_asks_different_things_of_the_two_sides(tmp_path: Path, renderer: Renderer) -> None:
    """Two questions asked fifty times each, as in a well-known persona set, never straddle the split."""
    lines = [chat("who are you?", f"answer {n}") for n in range(50)]
    lines += [chat("hello", f"answer {n}") for n in range(50)] + [chat(f"q{n}", "a") for n in range(100)]
    file = tmp_path / "d.jsonl"
    file.write_text("\n".join(lines))
    rows = prepare([file], renderer, max_length=200).rows
    for seed in range(5):
        train, held = split(rows, 0.1, seed)
        assert not set(train.keys) & set(held.keys)


def test_content_is_identity(tmp_path: Path, renderer: Renderer) -> None:
    """B24: another word, another template, another length: another digest; another name: the same."""
    first, second, third = (tmp_path / f"{n}.jsonl" for n in range(3))
    first.write_text(chat("one", "red") + "\n")
    second.write_text(chat("one", "red") + "\n")
    third.write_text(chat("one", "rad") + "\n")
    digests = [prepare([file], renderer, max_length=64).rows.digest() for file in (first, second, third)]
    assert digests[0] == digests[1] != digests[2]
    other = Renderer.load(renderer.tokenizer.folder, "plain")
    assert prepare([first], other, max_length=64).rows.digest() != digests[0]


def test_several_files_are_one_data_set(tmp_path: Path, renderer: Renderer) -> None:
    first, second = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    first.write_text(chat("one", "red"))
    second.write_text(chat("two", "blue") + "\n" + '{"prompt": "p", "completion": " c"}\n')
    with pytest.raises(BadData) as caught:
        prepare([first, second], renderer, max_length=64)
    assert [(problem.line, problem.file) for problem in caught.value.problems] == [(2, "b.jsonl")]
    second.write_text(chat("two", "blue"))
    prepared = prepare([first, second], renderer, max_length=64)
    assert prepared.records == len(prepared.rows) == 2 and len(prepared.files) == 2
    with pytest.raises(NotFound, match=r"No data file .*nowhere"):
        prepare([tmp_path / "nowhere"], renderer, max_length=64)


def test_every_record_is_accounted_for(tmp_path: Path, renderer: Renderer) -> None:
    lines = [chat(f"q{n}", "word " * (n * 12)) for n in range(1, 11)]
    file = tmp_path / "d.jsonl"
    file.write_text("\n".join(lines))
    dropped = prepare([file], renderer, max_length=100, overlong="drop")
    cut = prepare([file], renderer, max_length=100, overlong="truncate")
    assert dropped.records == cut.records == 10 == dropped.dropped + len(dropped.rows)
    assert cut.truncated == dropped.dropped > 0 and cut.dropped == 0 and len(cut.rows) == 10
    whole = prepare([file], renderer, max_length=10_000)
    assert whole.rows.tokens == cut.rows.tokens + cut.lost_tokens == dropped.rows.tokens + dropped.lost_tokens
    assert whole.rows.supervised == cut.rows.supervised + cut.lost_supervised
    assert whole.rows.supervised == dropped.rows.supervised + dropped.lost_supervised
    with pytest.raises(BadData) as caught:
        prepare([file], renderer, max_length=100)
    assert len(caught.value.problems) == dropped.dropped


def test_a_text_is_whole_across_blocks(tmp_path: Path, renderer: Renderer) -> None:
    """A file longer than one block: the windows' tokens decode to the file, and end once."""
    text = "".join(f"line {n} of the text, with words.\n" for n in range(4000))
    file = tmp_path / "t.txt"
    file.write_text(text)
    prepared = prepare([file], renderer, max_length=128)
    ids: list[int] = []
    for n, (row, weights) in enumerate(prepared.rows):
        joins = n > 0 and bool(ids) and int(row[0]) == ids[-1] and len(weights) > 1
        fresh = n > 0 and prepared.rows.sources[n] != prepared.rows.sources[n - 1]
        ids += [int(token) for token in (row[1:] if joins and not fresh else row)]
    assert renderer.tokenizer.decode(ids) == text + "<|im_end|>"
    blocks = len(set(prepared.rows.sources))
    assert blocks > 1 and prepared.rows.supervised == len(ids) - blocks
    assert all(int(np.count_nonzero(weights)) == len(weights) - 1 for _, weights in prepared.rows)


def test_prompts_weigh_a_little_when_asked(tmp_path: Path) -> None:
    """Prompt tokens get the weight, completions 1; chats stay as they are; counts and keys are those of answers."""
    folder = tiny_models.make_tokenizer(tmp_path / "tokenizer")
    file = tmp_path / "d.jsonl"
    file.write_text(
        json.dumps({"prompt": "color 3 ->", "completion": " red"})
        + "\n"
        + json.dumps({"prompt": "color 4 ->", "completion": " red"})
    )
    talk = tmp_path / "chats.jsonl"
    talk.write_text(chat("hello", "good day"))

    def read(path: Path, weight: float) -> Rows:
        return prepare([path], Renderer.load(folder, prompt_weight=weight), max_length=64).rows

    plain, tenth, whole = (read(file, weight) for weight in (0.0, 0.1, 1.0))
    for (ids, weights), (same, before) in zip(tenth, plain, strict=True):
        assert ids.tolist() == same.tolist()
        first = int(np.argmax(before))
        assert first > 2 and weights[0] == 0  # nothing predicts the first token
        assert set(weights[1:first].tolist()) == {np.float32(0.1)}
        assert weights[first:].tolist() == before[first:].tolist() == [1.0] * (len(ids) - first)
    assert whole[0][1][1:] == pytest.approx(1.0, abs=1e-6)
    assert plain.supervised == tenth.supervised == whole.supervised
    assert plain.keys == tenth.keys == whole.keys and len(set(plain.keys)) == 2
    assert plain.digest() == tenth.answers().digest() == whole.answers().digest() != tenth.digest()
    assert read(talk, 0.1).digest() == read(talk, 0.0).digest()
    assert tenth.pairs and not read(talk, 0.1).pairs and tenth.answers().pairs


def test_a_cut_that_leaves_only_a_weighted_prompt_drops_the_row(tmp_path: Path) -> None:
    folder = tiny_models.make_tokenizer(tmp_path / "tokenizer")
    file = tmp_path / "d.jsonl"
    rows = [{"prompt": "one two three four five six seven eight nine ten ->", "completion": " red"}]
    file.write_text("\n".join(map(json.dumps, [*rows, {"prompt": "1", "completion": " 2"}])))
    cut = prepare([file], Renderer.load(folder, prompt_weight=0.5), max_length=8, overlong="truncate")
    assert (cut.dropped, cut.truncated, len(cut.rows)) == (1, 0, 1) and cut.lost_supervised > 0
