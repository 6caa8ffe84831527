"""The cases: rows of token ids with the mask of what is learnt, in the order in which everybody takes them.

A case is made by seeded code (text.py) and the model's own tokenizer, and must have the hash that HASHES names: a
benchmark whose rows drift compares nothing. Rows are cut at token ids, so their lengths are exact and no chat template
is involved: every trainer gets the same ids and masks.
Does not know: trainers, time.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

SMOL, GEMMA = "smollm2-135m-instruct", "gemma3-270m"

Row = tuple[list[int], list[int]]  # ids, and for each id whether it is learnt (0 or 1)
Pick = Callable[[str, str, int], list[int]]  # (kind of text, seed, tokens) -> exactly so many ids


@dataclass(frozen=True)
class Case:
    """One line of the table. `steps` are there to be taken; `gate_rows` make a step of the gate, which takes few."""

    name: str
    title: str
    shape: str  # which function below makes its rows
    model: str = SMOL
    full: bool = False  # every weight learns, instead of LoRA
    rows_per_step: int = 16
    steps: int = 4
    held_out: int = 4
    gate_rows: int = 8
    gate_steps: int = 2
    rate: float = 5e-4


@dataclass
class Workload:
    """Rows in order, and held-out rows."""

    train: list[Row] = field(default_factory=list)
    held_out: list[Row] = field(default_factory=list)

    def digest(self) -> str:
        total = hashlib.sha256()
        for rows in (self.train, self.held_out):
            total.update(len(rows).to_bytes(8, "little"))
            for ids, mask in rows:
                total.update(len(ids).to_bytes(8, "little"))
                total.update(np.asarray(ids, "<i4").tobytes() + bytes(mask))
        return total.hexdigest()


CASES: dict[str, Case] = {
    case.name: case
    for case in (
        Case("S1", "chat, one system prompt of 1,000 tokens, then 80 + 120", "shared", gate_steps=1),
        Case("S2", "chats of three turns that share nothing", "turns", rows_per_step=8, steps=6, gate_rows=4),
        Case(
            "S3",
            "short chats, 24 to 200 tokens",
            "short",
            rows_per_step=32,
            steps=30,
            held_out=32,
            gate_steps=3,
        ),
        Case("C1", "plain text, 2,048 tokens a row, all learnt", "text", rows_per_step=4, held_out=2, gate_rows=2),
        Case(
            "F3",
            "short chats, every weight learns",
            "short",
            full=True,
            rows_per_step=32,
            steps=30,
            held_out=32,
            gate_steps=3,
            rate=2e-5,
        ),
        Case("G1", "as S1, Gemma 3 270M", "shared", model=GEMMA, gate_steps=1),
    )
}

# sha256 of ids and masks, by (shape, model). Change a maker and this must change with it, with a word in the changelog.
HASHES: dict[tuple[str, str], str] = {
    ("shared", SMOL): "7fd4155d4fc982eccc96d122e82bbdd937bee90f46fa8a4cd609ea4b2005e59c",
    ("turns", SMOL): "905d00c3076a8c4a54cd2d66df8c161ad208f7bfee6a1f11379efe36cada668c",
    ("short", SMOL): "5d42b9e16e0668fec56ead75ffaaac6dfd41183f10febb257eb83177dba0e69f",
    ("text", SMOL): "33d86d1888449c8590c78705307a0ff057b604ef70863025aacbe24d0d84ac1f",
    ("shared", GEMMA): "550cec0cc2c7d7866ba9842b67835b8c3afcf08c575a77cf161a109d7148923f",
}


def _shared(pick: Pick, start: int, count: int) -> list[Row]:
    system = pick("rule", "the one", 1000)
    return [
        (
            [*system, *pick("order", f"s1 {number}", 80), *pick("answer", f"s1 {number}", 120)],
            [0] * 1080 + [1] * 120,
        )
        for number in range(start, start + count)
    ]


def _turns(pick: Pick, start: int, count: int) -> list[Row]:
    rows = []
    for number in range(start, start + count):
        chance = random.Random(f"turns {number}")
        ids: list[int] = []
        mask: list[int] = []
        for turn in range(3):
            asked, said = chance.randint(40, 140), chance.randint(60, 200)
            ids += pick("order", f"s2 {number} {turn}", asked) + pick("answer", f"s2 {number} {turn}", said)
            mask += [0] * asked + [1] * said
        rows.append((ids, mask))
    return rows


def _short(pick: Pick, start: int, count: int) -> list[Row]:
    rows = []
    for number in range(start, start + count):
        chance = random.Random(f"short {number}")
        asked = round(12 * (100 / 12) ** chance.random())  # most are short, some are long
        said = chance.randint(12, 100)
        ids = pick("order", f"s3 {number}", asked) + pick("answer", f"s3 {number}", said)
        rows.append((ids, [0] * asked + [1] * said))
    return rows


def _text(pick: Pick, start: int, count: int) -> list[Row]:
    return [(pick("story", f"c1 {number}", 2048), [0] + [1] * 2047) for number in range(start, start + count)]


MAKERS: dict[str, Callable[[Pick, int, int], list[Row]]] = {
    "shared": _shared,
    "turns": _turns,
    "short": _short,
    "text": _text,
}


def make(case: Case, tokenizer_file: Path) -> Workload:
    """The rows of a case. Raises SystemExit when they are not those that were frozen."""
    workload = _make(case, tokenizer_file)
    wanted = HASHES.get((case.shape, case.model))
    if wanted != workload.digest():
        raise SystemExit(
            f"{case.name}: the rows have the hash {workload.digest()}, wanted {wanted}. The tokenizer of {case.model} "
            "or the code that makes the rows is not the one that the benchmark was frozen with."
        )
    return workload


def _make(case: Case, tokenizer_file: Path) -> Workload:
    pick, maker = _picker(tokenizer_file), MAKERS[case.shape]
    train = case.rows_per_step * case.steps
    return Workload(maker(pick, 0, train), maker(pick, 1_000_000, case.held_out))


def _picker(tokenizer_file: Path) -> Pick:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(tokenizer_file))

    def pick(kind: str, seed: str, tokens: int) -> list[int]:
        from benchmarks.training.text import sentences

        count = tokens // 8 + 8
        ids: list[int] = tokenizer.encode(sentences(kind, seed, count), add_special_tokens=False).ids
        assert len(ids) >= tokens, (kind, seed, tokens)
        return ids[:tokens]

    return pick


def save(workload: Workload, path: Path) -> None:
    """As a safetensors file: for "train" and "held_out" each `ids` and `mask` [all tokens] and `lengths` [rows]."""
    from safetensors.numpy import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, npt.NDArray[Any]] = {}
    for name, rows in (("train", workload.train), ("held_out", workload.held_out)):
        tensors[f"{name}.ids"] = np.array([token for ids, _ in rows for token in ids], np.int32)
        tensors[f"{name}.mask"] = np.array([one for _, mask in rows for one in mask], np.uint8)
        tensors[f"{name}.lengths"] = np.array([len(ids) for ids, _ in rows], np.int32)
    save_file(tensors, path)


def lengths_of(rows: Sequence[Row]) -> list[int]:
    return [len(ids) for ids, _ in rows]
