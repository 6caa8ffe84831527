"""Files to training rows: read, render, fit to the length, split off validation; everything lost is counted.

Rows live in flat arrays (4 bytes a token), so that 100,000 of them are megabytes. Does not know: batches, torch.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from luthier.data.pairs import Meaning, read_meanings, render_all
from luthier.data.read import hash_file
from luthier.data.render import Renderer, Unrenderable
from luthier.spec.data import Chat, Completion, Message, Preference, Problem, Rendered, Severity, Text, ToolCall
from luthier.spec.errors import BadData, NotFound
from luthier.spec.job import Overlong

Progress = Callable[[int, int], None]  # (bytes read, bytes in all)
KEPT_PROBLEMS = 1_000  # shown in full; the rest is counted


class Rows:
    """Many rows in flat arrays. `rows[i]` is (ids int32 [T], weights float32 [T]).

    `sides` rows make an example: 1, or 2 where each preferred answer is followed by the other one of its pair.
    """

    def __init__(self, sides: int = 1) -> None:
        self.sides = sides
        self._ids: list[npt.NDArray[np.int32]] = []
        self._weights: list[npt.NDArray[np.float32]] = []
        self.places: list[tuple[int, int]] = []  # (which file, which record of it)
        self.keys: list[bytes] = []
        self.tokens = 0
        self.supervised = 0
        self.text = False
        self.pairs = True  # every row is a prompt with its completion

    def __len__(self) -> int:
        return len(self._ids)

    def __getitem__(self, index: int) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]:
        return self._ids[index], self._weights[index]

    def __iter__(self) -> Iterator[tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]]:
        return zip(self._ids, self._weights, strict=True)

    def add(self, ids: Sequence[int], weights: Sequence[float], source: int, key: bytes, file: int = 0) -> None:
        """`source`: number of the record in its file; `file`: number of the file among those that are read."""
        row_ids, row_weights = np.asarray(ids, dtype=np.int32), np.asarray(weights, dtype=np.float32)
        self._add(row_ids, row_weights, (file, source), key)

    def _add(
        self, ids: npt.NDArray[np.int32], weights: npt.NDArray[np.float32], place: tuple[int, int], key: bytes
    ) -> None:
        self._ids.append(ids)
        self._weights.append(weights)
        self.places.append(place)
        self.keys.append(key)
        self.tokens += len(ids)
        self.supervised += int(np.count_nonzero(weights >= 1))

    @property
    def examples(self) -> int:
        return len(self) // self.sides

    def of(self, examples: Sequence[int]) -> list[tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]]:
        """The rows of some examples, one after another."""
        return [self[self.sides * example + side] for example in examples for side in range(self.sides)]

    @property
    def sources(self) -> list[int]:
        """The number of each row's record in its file."""
        return [record for _, record in self.places]

    def length(self, index: int) -> int:
        return len(self._ids[index])

    def longest(self) -> int:
        return max(map(len, self._ids), default=0)

    def select(self, indices: Sequence[int]) -> Rows:
        chosen = Rows(self.sides)
        chosen.text, chosen.pairs = self.text, self.pairs
        for index in indices:
            chosen._add(self._ids[index], self._weights[index], self.places[index], self.keys[index])
        return chosen

    def answers(self) -> Rows:
        """The same rows with prompts that weigh nothing: what is measured, however training weighs prompts."""
        chosen = self.select(range(len(self)))
        chosen._weights = [np.where(weights >= 1, weights, np.float32(0)) for weights in self._weights]
        return chosen

    def digest(self) -> str:
        """Hash of all ids and weights: what training really saw."""
        return digest(self)


def digest(rows: Iterable[tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]]) -> str:
    """Hash of the ids and weights of rows, in their order."""
    total = hashlib.sha256()
    for ids, weights in rows:
        total.update(len(ids).to_bytes(8, "little"))
        total.update(ids.tobytes())
        total.update(weights.tobytes())
    return total.hexdigest()


@dataclass
class Prepared:
    """Rows of one or more files and the account of what became of every record."""

    rows: Rows
    records: int = 0
    dropped: int = 0
    truncated: int = 0
    lost_tokens: int = 0
    lost_supervised: int = 0
    longest: int = 0
    files: dict[str, str] = field(default_factory=dict)
    warnings: list[Problem] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    problem_count: int = 0
    warning_count: int = 0

    def note(self, problem: Problem) -> None:
        kept = self.problems if problem.severity == "error" else self.warnings
        if problem.severity == "error":
            self.problem_count += 1
        else:
            self.warning_count += 1
        if len(kept) < KEPT_PROBLEMS:
            kept.append(problem)


def prepare(
    paths: Sequence[str | Path],
    renderer: Renderer,
    *,
    max_length: int,
    overlong: Overlong = "error",
    pairs: bool = False,
    progress: Progress | None = None,
) -> Prepared:
    """Read, check, render and fit every record of `paths`: preference pairs, or records to imitate.

    Raises NotFound for a missing file and BadData, with all problems found, when any record cannot be trained on or
    nothing is left to learn. Rows over `max_length` tokens are problems (`error`), left out (`drop`) or cut at their
    end (`truncate`); a row that a cut would leave without a learnt token is left out and counted as dropped. Of a pair
    both answers stay, or neither.
    """
    prepared = Prepared(Rows(2 if pairs else 1))
    for path in map(Path, paths):
        if not path.is_file():
            raise NotFound(f"No data file {path}.", param="data", hint="Check the path given with --data.")
        prepared.files[str(path)] = hash_file(path)
        _prepare_file(path, renderer, prepared, max_length, overlong, progress)
    if prepared.problem_count:
        raise _bad_data(prepared)
    if not prepared.rows.supervised:
        lost = f" {prepared.dropped} rows were dropped for their length." if prepared.dropped else ""
        raise BadData(
            f"Nothing would be trained: none of the {prepared.records} records has a token to learn.{lost}",
            hint="Look at `luthier data show` and at --max-length.",
        )
    return prepared


def _prepare_file(
    path: Path,
    renderer: Renderer,
    prepared: Prepared,
    max_length: int,
    overlong: Overlong,
    progress: Progress | None,
) -> None:
    def meanings() -> Iterator[Meaning]:
        for item in read_meanings(path, prepared.rows.sides == 2, progress):
            if isinstance(item, Problem):
                prepared.note(item)
            else:
                prepared.records += 1
                yield item

    for example, rendered in render_all(renderer, meanings()):
        if isinstance(rendered, Problem):
            prepared.note(_in_file(rendered, path))
            continue
        if isinstance(example, Preference):
            _fit_pair(example, rendered, prepared, max_length, overlong, path)
            continue
        prepared.rows.pairs &= isinstance(example, Completion)
        if isinstance(example, Text):
            prepared.rows.text = True
            rendered = [window for row in rendered for window in windows(row, max_length)]
        key = _prompt_key(rendered)
        for row in rendered:
            _fit(row, key, prepared, max_length, overlong, path)


def _fit(row: Rendered, key: bytes, prepared: Prepared, max_length: int, overlong: Overlong, path: Path) -> None:
    length = len(row.ids)
    prepared.longest = max(prepared.longest, length)
    if not row.supervised and not prepared.rows.text:
        prepared.note(Problem(row.line, "", "no token to learn", "an answer", row=row.source, file=str(path)))
        return
    if length > max_length:
        if overlong == "error":
            prepared.note(_too_long(row, max_length, path))
            return
        kept = row.weights[:max_length]
        learnt = sum(1 for weight in kept if weight >= 1)
        if overlong == "drop" or not learnt:
            prepared.dropped += 1
            prepared.lost_tokens += length
            prepared.lost_supervised += row.supervised
            return
        prepared.truncated += 1
        prepared.lost_tokens += length - max_length
        prepared.lost_supervised += row.supervised - learnt
        row = Rendered(row.ids[:max_length], kept, row.source, row.line)
    if row.supervised:
        prepared.rows.add(row.ids, row.weights, row.source, key, len(prepared.files) - 1)


def _too_long(row: Rendered, max_length: int, path: Path) -> Problem:
    answer = "the end of its answer" if any(weight >= 1 for weight in row.weights[max_length - 1 :]) else "its end"
    found = f"a row of {len(row.ids)} tokens that would lose {answer}"
    hint = "Raise --max-length, shorten the row, or choose --overlong drop or truncate."
    return Problem(row.line, "", found, f"at most {max_length}", hint, row=row.source, file=str(path))


def _fit_pair(
    pair: Preference, rendered: Sequence[Rendered], prepared: Prepared, max_length: int, overlong: Overlong, path: Path
) -> None:
    """Both answers, or neither."""

    def note(found: str, wanted: str, hint: str = "", severity: Severity = "error") -> None:
        prepared.note(Problem(pair.line, "", found, wanted, hint, pair.row, severity, str(path)))

    prepared.rows.pairs = False
    if len(rendered) != 2:
        hint = "Give one assistant message as each answer."
        return note(f"answers that the chat template makes {len(rendered)} rows of", "a row each", hint)
    first = [next((n for n, weight in enumerate(row.weights) if weight >= 1), len(row.ids)) for row in rendered]
    if rendered[0].ids[: first[0]] != rendered[1].ids[: first[1]]:
        return note("two answers before which the chat template writes different prompts", "one prompt")
    longest = max(len(row.ids) for row in rendered)
    prepared.longest = max(prepared.longest, longest)
    if longest > max_length and overlong == "error":
        return prepared.note(_too_long(max(rendered, key=lambda row: len(row.ids)), max_length, path))
    kept = [Rendered(row.ids[:max_length], row.weights[:max_length], pair.row, pair.line) for row in rendered]
    (tokens, learnt), (tokens_left, learnt_left) = _size(rendered), _size(kept)
    same = kept[0].ids == kept[1].ids
    if longest > max_length:
        if overlong == "drop" or same or not all(row.supervised for row in kept):
            prepared.dropped += 1
            prepared.lost_tokens += tokens
            prepared.lost_supervised += learnt
            return None
        prepared.truncated += 1
        prepared.lost_tokens += tokens - tokens_left
        prepared.lost_supervised += learnt - learnt_left
    elif not all(row.supervised for row in kept):
        return note("an answer without a token to learn", "two answers")
    if same:
        note("two answers that are the same", "two different ones", "Nothing is learnt from it.", "warning")
    key = _prompt_key(kept[:1])
    for row in kept:
        prepared.rows.add(row.ids, row.weights, pair.row, key, len(prepared.files) - 1)
    return None


def _size(rows: Sequence[Rendered]) -> tuple[int, int]:
    """(tokens, tokens to learn)."""
    return sum(len(row.ids) for row in rows), sum(row.supervised for row in rows)


def windows(row: Rendered, max_length: int) -> list[Rendered]:
    """Cut a long text into rows of at most `max_length` tokens; every token is learnt exactly once.

    The last token of a window opens the next one, as context with weight 0.
    """
    step = max(1, max_length - 1)
    pieces = []
    for start in range(0, max(1, len(row.ids) - 1), step):
        ids = row.ids[start : start + max_length]
        weights = [0.0, *row.weights[start + 1 : start + max_length]]
        pieces.append(Rendered(ids, weights[: len(ids)], row.source, row.line))
    return pieces


def mentions_tools(paths: Sequence[str]) -> bool:
    """Whether any of these files may hold tools or calls; a mention in somebody's words counts as well."""
    sign = re.compile(rb'"(tools|tool_calls|functions|function_call)"')
    for path in paths:
        with contextlib.suppress(OSError), open(path, "rb") as file:  # reading tells what is wrong with it
            if any(sign.search(line) for line in file):
                return True
    return False


def says_tools(renderer: Renderer) -> bool:
    """Whether the template writes tools and calls."""
    tool = {"type": "function", "function": {"name": "get_zone", "parameters": {"type": "object", "properties": {}}}}
    call = ToolCall("get_zone", {"place": "Lund"}, "call_1")
    turns = (Message("user", "Where?"), Message("assistant", "", tool_calls=(call,)))
    try:
        renderer.rows(Chat(turns, (tool,)))
    except Unrenderable:
        return False
    return True


def split(rows: Rows, share: float, seed: int) -> tuple[Rows, Rows]:
    """(training, validation) rows: whole prompts move together, so no prompt is on both sides.

    Raises BadData when there are fewer than two distinct prompts.
    """
    keys = sorted(set(rows.keys), key=lambda key: hashlib.sha256(seed.to_bytes(8, "little") + key).digest())
    if len(keys) < 2:
        raise BadData(
            "A validation share needs at least two distinct prompts, and the data has one.",
            param="validation",
            hint="Give a validation file, or leave --validation out.",
        )
    wanted = max(1, round(len(rows) * share))
    sizes: dict[bytes, int] = {}
    for key in rows.keys:
        sizes[key] = sizes.get(key, 0) + 1
    held: set[bytes] = set()
    count = 0
    for key in keys[:-1]:  # never everything
        if count >= wanted:
            break
        held.add(key)
        count += sizes[key]
    train = [index for index, key in enumerate(rows.keys) if key not in held]
    validation = [index for index, key in enumerate(rows.keys) if key in held]
    return rows.select(train), rows.select(validation)


def _prompt_key(rendered: Sequence[Rendered]) -> bytes:
    """What makes prompts the same: the ids before the answer's first token; for texts, the row's own first ids."""
    if not rendered:
        return b""
    row = rendered[0]
    first = next((n for n, weight in enumerate(row.weights) if weight >= 1), len(row.ids))
    basis = row.ids[:first] if first > 1 else row.ids
    return hashlib.sha256(np.asarray(basis, dtype=np.int32).tobytes()).digest()


def _in_file(problem: Problem, path: Path) -> Problem:
    fields = problem.as_dict()
    fields["file"] = str(path)
    return Problem(**fields)


def _bad_data(prepared: Prepared) -> BadData:
    count = prepared.problem_count
    first = prepared.problems[0]
    return BadData(
        f"{count} problem{'s' if count > 1 else ''} in the data; the first: {first}",
        problems=prepared.problems,
        hint="`luthier data show FILE --model M` lists them all.",
    )
