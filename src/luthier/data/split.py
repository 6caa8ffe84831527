"""A file to a part to train on and a part to measure on: whole prompts move together, classes keep their shares.

Which rows are held out depends on the prompts, the share and the seed alone, not on the order of the file.
Does not know: tokens; what rows look like (rows.py).
"""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from luthier.data.new_file import check_free, new_file
from luthier.data.read import OnBytes
from luthier.data.rows import Lines, good_rows, is_array, normal, parts
from luthier.spec.data import Example, Preference, Text
from luthier.spec.errors import BadData, BadSetting

Stratify = Literal["auto", "label", "none"]
MOST_CLASSES = 100
LONGEST_CLASS = 100  # characters of an answer that can be a class
ROWS_A_CLASS = 3  # on average, at least


@dataclass(frozen=True)
class Part:
    file: str
    rows: int
    prompts: int


@dataclass(frozen=True)
class SplitDone:
    """What became of a file. `classes`: answer -> (training rows, validation rows), empty when not stratified."""

    train: Part
    validation: Part
    seed: int
    share: float
    stratified: bool
    classes: dict[str, tuple[int, int]] = field(default_factory=dict)


@dataclass
class _Plan:
    """One entry a row: the number of its prompt. One entry a prompt: its key, rows and class."""

    of_row: array[int] = field(default_factory=lambda: array("I"))
    keys: list[bytes] = field(default_factory=list)
    rows: array[int] = field(default_factory=lambda: array("I"))
    labels: list[str | None] = field(default_factory=list)
    answers: Counter[str] = field(default_factory=Counter)
    classes: bool = True  # answers still look like classes
    distinct: int = 0


def split_file(
    source: Path,
    train: Path,
    validation: Path,
    *,
    share: float,
    seed: int = 0,
    stratify: Stratify = "auto",
    force: bool = False,
    on_bytes: OnBytes | None = None,
) -> SplitDone:
    """Write `train` and `validation`; every row of `source` is in one of them, with its own bytes and in its order.

    Rows with the same prompt (case, white space and compatibility forms aside) are in the same part. Raises BadSetting
    for a share that is not between 0 and 1, and BadData for rows that cannot be read, fewer than two prompts, or
    answers that are no classes where `stratify` is "label".
    """
    if not 0 < share < 1:
        raise BadSetting(
            f"--share is {share:g}, wanted a number between 0 and 1.", hint="For instance 0.1.", param="share"
        )
    if train.absolute() == validation.absolute():
        raise BadSetting(f"Both parts would be {train}.", hint="Give them different names.", param="validation")
    check_free(train, force, "train")
    check_free(validation, force, "validation")
    plan = _read(source, on_bytes)
    if len(plan.keys) < 2:
        raise BadData(
            f"{source} has {len(plan.keys)} distinct prompt, and a split needs at least two.",
            hint="Rows with the same prompt stay together, or validation would measure memory.",
            param="file",
        )
    labelled = stratify != "none" and _looks_like_classes(plan)
    if stratify == "label" and not labelled:
        raise BadData(
            f"{source}: the answers are no classes: {plan.distinct:,} different ones in {len(plan.of_row):,} rows.",
            hint=f"Wanted 2 to {MOST_CLASSES} short ones, {ROWS_A_CLASS} rows each on average. Use --stratify auto.",
            param="stratify",
        )
    held = choose(plan.keys, plan.rows, plan.labels if labelled else [None] * len(plan.keys), share, seed)
    return _write(source, train, validation, plan, held, labelled, share, seed, force, on_bytes)


def choose(
    keys: Sequence[bytes], rows: Sequence[int], labels: Sequence[str | None], share: float, seed: int
) -> set[int]:
    """The prompts to hold out, by number: about `share` of each label's rows; at least one prompt and never all.

    The labels' quotas are whole numbers that sum to round(share x all rows), by largest remainder; a prompt with more
    rows than its quota has left stays in training.
    """
    sizes: dict[str | None, int] = {}
    for label, count in zip(labels, rows, strict=True):
        sizes[label] = sizes.get(label, 0) + count
    quotas = _quotas(sizes, share)
    order = sorted(
        range(len(keys)), key=lambda n: hashlib.sha256(seed.to_bytes(8, "little", signed=True) + keys[n]).digest()
    )
    held: set[int] = set()
    for n in order:
        if rows[n] <= quotas[labels[n]]:
            quotas[labels[n]] -= rows[n]
            held.add(n)
    if not held:
        held.add(min(order, key=lambda n: rows[n]))
    if len(held) == len(keys):
        held.discard(order[-1])
    return held


def _quotas(sizes: dict[str | None, int], share: float) -> dict[str | None, int]:
    exact = {label: count * share for label, count in sizes.items()}
    quotas = {label: int(wanted) for label, wanted in exact.items()}
    left = max(1, round(sum(sizes.values()) * share)) - sum(quotas.values())
    by_remainder = sorted(exact, key=lambda label: (quotas[label] - exact[label], str(label)))
    for label in by_remainder[:left]:
        quotas[label] += 1
    return quotas


def _read(source: Path, on_bytes: OnBytes | None) -> _Plan:
    plan = _Plan()
    number: dict[bytes, int] = {}
    for _, meaning in good_rows(source, on_bytes, "split"):
        asked, answer = parts(meaning)
        key = prompt_key(meaning)
        if key not in number:
            number[key] = len(plan.keys)
            plan.keys.append(key)
            plan.rows.append(0)
            plan.labels.append(None)
        group = number[key]
        plan.of_row.append(group)
        plan.rows[group] += 1
        _note_answer(plan, group, answer if asked else None)
    return plan


def prompt_key(meaning: Example | Preference) -> bytes:
    """What makes two prompts the same: 16 bytes of the normalised turns before the answer; of plain text, all of it."""
    asked, answer = parts(meaning)
    basis = "t" + normal(answer) if isinstance(meaning, Text) or not asked else "p" + normal(asked)
    return hashlib.blake2b(basis.encode(), digest_size=16).digest()


def _note_answer(plan: _Plan, group: int, answer: str | None) -> None:
    """The first answer of a prompt is its class, until there are too many different ones."""
    if not plan.classes:
        plan.distinct += 1
        return
    label = None if answer is None else answer.strip()
    if label is None or len(label) > LONGEST_CLASS:
        plan.classes = False
    else:
        plan.answers[label] += 1
        if plan.labels[group] is None:
            plan.labels[group] = label
        plan.classes = len(plan.answers) <= MOST_CLASSES
    plan.distinct = len(plan.answers) + (label is None or len(label) > LONGEST_CLASS)
    if not plan.classes:
        plan.labels = [None] * len(plan.labels)


def _looks_like_classes(plan: _Plan) -> bool:
    return plan.classes and len(plan.answers) >= 2 and ROWS_A_CLASS * len(plan.answers) <= len(plan.of_row)


def _write(
    source: Path,
    train: Path,
    validation: Path,
    plan: _Plan,
    held: set[int],
    labelled: bool,
    share: float,
    seed: int,
    force: bool,
    on_bytes: OnBytes | None,
) -> SplitDone:
    array_layout = is_array(source)
    counts: dict[str, list[int]] = {}
    with ExitStack() as files:
        lines = [
            Lines(files.enter_context(new_file(path, force=force, param=param)), array_layout)
            for path, param in ((train, "train"), (validation, "validation"))
        ]
        for at, (record, meaning) in enumerate(good_rows(source, on_bytes, "split")):
            side = plan.of_row[at] in held
            lines[side].add(record)
            if labelled:
                counts.setdefault(parts(meaning)[1].strip(), [0, 0])[side] += 1
        for each in lines:
            each.end()
    made = [
        Part(str(path), each.count, prompts)
        for path, each, prompts in zip((train, validation), lines, (len(plan.keys) - len(held), len(held)), strict=True)
    ]
    classes = {label: (pair[0], pair[1]) for label, pair in sorted(counts.items())}
    return SplitDone(made[0], made[1], seed, share, labelled, classes)
