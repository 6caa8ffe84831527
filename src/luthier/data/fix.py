"""A data file mended as asked: rows left out, repeats left out, private data, roles and endings changed; all logged.

The file is read twice: once to choose, once to write. Which rows go is decided on the rows as they stand (with roles
normalised first, if asked); texts are changed after that. Rows that nothing changes keep their bytes.
The looks are those of the report (choose.py), so what `luthier data check` counts is what goes.
Does not know: how a record is changed (mends.py), how one asks (cli).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import IO, Any

from luthier.data.choose import Chooser, Dedupe, Gone, training_rows
from luthier.data.endings import Endings, completion_ending, prompt_ending
from luthier.data.mends import Change, add_ending, add_space, normalise_roles, redact
from luthier.data.new_file import check_free, new_file
from luthier.data.prepare import COMPLETION_ENDINGS, PROMPT_ENDINGS
from luthier.data.read import OnBytes, Record, is_plain_text, read_records
from luthier.data.render import Renderer
from luthier.data.rows import Lines, Row, is_array, kind_of, on_one_line, rows_of, whole
from luthier.data.split import SplitDone, split_file
from luthier.spec.data import Completion, Problem
from luthier.spec.errors import BadData, BadSetting, NotFound

Tell = Callable[[str], OnBytes]
_SPACE = "start of the completion"
CHUNK = 512  # rows looked at together


@dataclass(frozen=True)
class Fixes:
    """What was chosen; nothing else is done. `apart_from`: training files whose rows, and rows almost like them, this
    validation file must not have. `validation`: where to put a `share` of the rows, None for no split."""

    dedupe: Dedupe | None = None
    drop: frozenset[str] = frozenset()
    redact: bool = False
    normalise_roles: bool = False
    add_separators: bool = False
    add_end_markers: bool = False
    validation: Path | None = None
    share: float = 0.1
    seed: int = 0
    apart_from: tuple[Path, ...] = ()

    def __bool__(self) -> bool:
        edits = self.redact or self.normalise_roles or self.add_separators or self.add_end_markers
        return bool(self.dedupe or self.drop or edits or self.validation or self.apart_from)


@dataclass
class Fixed:
    """What was done. `dropped`: kind -> rows; `changed`: kind of change -> rows. `invalid`: rows that stay and that no
    training run accepts. `endings`: what was added to prompts and completions."""

    out: str
    log: str
    records: int = 0
    rows: int = 0
    unchanged: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    changed: dict[str, int] = field(default_factory=dict)
    endings: dict[str, str] = field(default_factory=dict)
    invalid: int = 0
    split: SplitDone | None = None


@dataclass
class _Survey:
    chooser: Chooser
    format: str | None = None
    prompts: Endings = field(default_factory=Endings)
    completions: Endings = field(default_factory=Endings)
    free: dict[str, list[str]] = field(default_factory=dict)  # endings that stand in no text, by field
    problems: list[Problem] = field(default_factory=list)
    last_unreadable: bool = False
    spaced: int = 0  # completions that begin with a space, less those that do not
    invalid: int = 0


def log_path(out: Path) -> Path:
    return out.with_name(f"{out.name.removesuffix('.jsonl')}.changes.jsonl")


def fix(
    source: Path,
    out: Path,
    fixes: Fixes,
    renderer: Renderer | None = None,
    max_length: int | None = None,
    *,
    force: bool = False,
    tell: Tell | None = None,
) -> Fixed:
    """Write `out` and, beside it, the log of changes. Raises NotFound, BadSetting for choices that have no use for this
    file, BadData for rows that cannot be read and are not to be dropped, or when no row would be left."""
    if not fixes:
        raise BadSetting(
            "No fix was chosen, so there is nothing to do.", hint="See `luthier data check`.", param="fixes"
        )
    if not source.is_file():
        raise NotFound(f"No data file {source}.", hint="Check the path.", param="file")
    if is_plain_text(source):
        raise BadData(f"{source} is plain text: one document, which has no rows to mend.", param="file")
    for path, param in ((out, "out"), (log_path(out), "out"), (fixes.validation, "split")):
        if path is not None:
            check_free(path, force, param)
    training = training_rows(fixes.apart_from)
    survey = _look(source, fixes, Chooser(fixes.drop, fixes.dedupe, renderer, max_length, training), tell)
    gone = survey.chooser.finish()
    _check(source, fixes, survey)
    done = Fixed(str(out), str(log_path(out)), invalid=0 if "invalid" in fixes.drop else survey.invalid)
    endings = _endings(fixes, survey)
    done.endings = endings
    with ExitStack() as files:
        log = files.enter_context(new_file(log_path(out), force=force))
        place = out if fixes.validation is None else out.with_name(f".{out.stem}.fixed{out.suffix}")
        if fixes.validation is not None:
            files.callback(place.unlink, missing_ok=True)
        with new_file(place, force=force or fixes.validation is not None) as handle:
            _write(source, Lines(handle, is_array(source)), log, fixes, gone, endings, done, tell)
        if fixes.validation is not None:
            done.split = split_file(place, out, fixes.validation, share=fixes.share, seed=fixes.seed, force=force)
    return done


# -- the first reading -------------------------------------------------------------------------------------------------


def _rows(source: Path, fixes: Fixes, on_bytes: OnBytes | None) -> Iterator[Row | Problem]:
    """Rows with their bytes; with their roles normalised when that was asked for, or they would not be readable."""

    def records() -> Iterator[Record | Problem]:
        for record in read_records(source, on_bytes, keep_raw=True):
            if fixes.normalise_roles and isinstance(record, Record):
                record = dataclasses.replace(record, value=normalise_roles(record.value)[0])
            yield record

    return rows_of(records(), source.name)


def _look(source: Path, fixes: Fixes, chooser: Chooser, tell: Tell | None) -> _Survey:
    survey = _Survey(chooser)
    options = {"prompt": PROMPT_ENDINGS, "completion": tuple(each for each in COMPLETION_ENDINGS if len(each) > 1)}
    survey.free = {name: list(endings) for name, endings in options.items()}
    rows = _rows(source, fixes, tell("Looking") if tell else None)
    while chunk := list(islice(rows, CHUNK)):
        chooser.look(chunk)
        for item in chunk:
            survey.last_unreadable = isinstance(item, Problem)
            if isinstance(item, Problem):
                survey.problems.append(item)
                continue
            survey.format = survey.format or kind_of(item.record.value)
            survey.invalid += item.meaning is None
            if isinstance(item.meaning, Completion):
                _note_endings(survey, item.meaning)
    return survey


def _note_endings(survey: _Survey, pair: Completion) -> None:
    survey.prompts.add(prompt_ending(pair.prompt), pair.row)
    survey.spaced += 1 if pair.completion.startswith(" ") else -1
    survey.completions.add(completion_ending(pair.completion), pair.row)
    for name, text in (("prompt", pair.prompt), ("completion", pair.completion)):
        survey.free[name] = [ending for ending in survey.free[name] if ending not in text]


def _check(source: Path, fixes: Fixes, survey: _Survey) -> None:
    for asked, option, wanted in (
        (fixes.add_separators, "add-separators", "completion"),
        (fixes.add_end_markers, "add-end-markers", "completion"),
        (fixes.normalise_roles, "normalise-roles", "chat"),
    ):
        if asked and survey.format != wanted:
            found = f"{source} holds {survey.format or 'no known'} records"
            raise BadSetting(f"--{option} is for {wanted} records, and {found}.", param=option)
    problems = survey.problems
    if problems and "unreadable" not in fixes.drop:
        raise BadData(
            f"{source}: {len(problems)} rows cannot be read; the first: {problems[0]}",
            problems=problems[:20],
            hint="Leave them out with --drop unreadable.",
            param="file",
        )
    if survey.last_unreadable and _one_value(source):
        raise BadData(
            f"{source}: the rest of the file cannot be read after {problems[-1]}",
            problems=problems[-1:],
            hint="Correct this place first: rows after it would be lost.",
            param="file",
        )
    if survey.invalid and fixes.validation is not None and "invalid" not in fixes.drop:
        raise BadData(
            f"{source}: {survey.invalid:,} rows are against the rules of their format, and cannot be split.",
            hint="Leave them out with --drop invalid.",
            param="split",
        )


def _one_value(source: Path) -> bool:
    """Whether the file is no JSON Lines, so that a syntax error ends its reading."""
    if is_array(source):
        return True
    with open(source, "rb") as handle:
        return handle.readline(1 << 20).strip() in (b"{", b"\xef\xbb\xbf{")


def _endings(fixes: Fixes, survey: _Survey) -> dict[str, str]:
    """The endings to add, by field: the one that most rows have, else one that stands in no text."""
    made: dict[str, str] = {}
    if fixes.add_separators:
        made |= {_SPACE: " "} if survey.spaced > 0 else {}
        made["prompt"] = survey.prompts.common() or next(iter(survey.free["prompt"]), "\n\n### =>\n\n")
    if fixes.add_end_markers:
        made["completion"] = survey.completions.common() or next(iter(survey.free["completion"]), " [END]")
    return made


# -- the second reading ------------------------------------------------------------------------------------------------


def _write(
    source: Path,
    lines: Lines,
    log: IO[bytes],
    fixes: Fixes,
    gone: dict[int, Gone],
    endings: dict[str, str],
    done: Fixed,
    tell: Tell | None,
) -> None:
    dropped: Counter[str] = Counter()
    changed: Counter[str] = Counter()
    for at, item in enumerate(read_records(source, tell("Writing") if tell else None, keep_raw=True)):
        done.records += 1
        why = gone.get(at)
        if why is not None:
            dropped[why.kind] += 1
            # Parts of a row that goes may be what should not be told.
            detail = why.detail.partition(":")[0] if fixes.redact else why.detail
            _note(log, item, change="dropped", what=why.kind, detail=detail)
        elif isinstance(item, Record):
            value, changes = _changed(item.value, fixes, endings)
            changed.update({change.change for change in changes})
            done.unchanged += not changes
            _add(lines, log, item, value, changes)
    lines.end()
    done.rows = lines.count
    done.dropped, done.changed = dict(sorted(dropped.items())), dict(sorted(changed.items()))
    if not done.rows:
        raise BadData(f"No row of {source} would be left.", hint="Choose fewer kinds with --drop.", param="drop")


def _changed(value: Any, fixes: Fixes, endings: dict[str, str]) -> tuple[Any, list[Change]]:
    changes: list[Change] = []
    if fixes.normalise_roles:
        value, more = normalise_roles(value)
        changes += more
    for key, ending in endings.items():
        value, more = add_space(value) if key == _SPACE else add_ending(value, key, ending)
        changes += more
    if fixes.redact:
        value, more = redact(value)
        changes += more
    return value, changes


def _add(lines: Lines, log: IO[bytes], record: Record, value: Any, changes: list[Change]) -> None:
    before = whole(record) if lines.array else on_one_line(record)
    if not changes:
        lines.add_raw(before)
        return
    after = json.dumps(value, ensure_ascii=False).encode()
    lines.add_raw(after)
    private = any(change.change == "redacted" for change in changes)
    hashes = {} if private else {"before": _hash(before), "after": _hash(after)}
    for change in changes:
        _note(log, record, **dataclasses.asdict(change), **hashes)


def _hash(raw: bytes) -> str:
    return hashlib.sha256(raw).hexdigest()[:16]


def _note(log: IO[bytes], item: Record | Problem, **told: Any) -> None:
    log.write(json.dumps({"line": item.line, "row": item.row, **told}, ensure_ascii=False).encode() + b"\n")
