"""What the data doctor can say: the kinds of findings, a finding, and the report that `luthier data check` gives.

A kind's name is the word for it everywhere: in the JSON, in `luthier data fix --drop KIND`, in a job's events.
Does not know: how anything is found (doctor.py and what it calls), how a report is shown.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from luthier.spec.data import Problem

Level = Literal["error", "warning", "note"]
LEVELS: tuple[Level, ...] = ("error", "warning", "note")  # the worst first
EXIT_CODES: dict[Level | None, int] = {"error": 2, "warning": 1, "note": 0, None: 0}
SHOWN_ROWS = 20  # example rows of a finding; the rest is counted


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of finding.

    `mend`: the options of `luthier data fix` that mend it, "" where a person has to look (proposals.py has the command
    for the file at hand). `by_row`: a row has it by
    itself, whatever the other rows are, so that `luthier data fix --drop KIND` can leave such rows out. `unit`: what
    a finding's count counts.
    """

    level: Level
    title: str
    why: str
    mend: str = ""
    by_row: bool = True
    unit: str = "row"


KINDS: dict[str, Kind] = {
    # -- what no setting can train on --------------------------------------------------------------------------------
    "convert": Kind(
        "error",
        "to be converted before training",
        "Training and the API read JSON Lines of the formats in docs/data-formats.md.",
        by_row=False,
    ),
    "unreadable": Kind(
        "error", "not readable", "Training and the API refuse a file with a row that is no JSON.", "--drop unreadable"
    ),
    "invalid": Kind(
        "error", "against the rules of its format", "Training and the API refuse the file.", "--drop invalid"
    ),
    "unrenderable": Kind(
        "error",
        "not expressible in the model's chat template",
        "What the template drops would be missing from training and serving alike, so such a row is refused.",
        "--drop unrenderable",
    ),
    "nothing_supervised": Kind(
        "error", "no token to learn", "The row would cost time and teach nothing.", "--drop nothing_supervised"
    ),
    # -- what only some settings train on ----------------------------------------------------------------------------
    "pairs": Kind(
        "note",
        "with two answers, a preferred one and another",
        "They are for `luthier train --objective dpo` (over the API: the method dpo); supervised runs refuse them.",
        by_row=False,
    ),
    # -- the same again ----------------------------------------------------------------------------------------------
    "duplicate": Kind(
        "warning",
        "repeats an earlier row",
        "Repeated rows weigh more than the others and are learnt by heart.",
        "--dedupe exact",
        by_row=False,
    ),
    "near_duplicate": Kind(
        "warning",
        "almost repeats an earlier row",
        "Rows that differ in a few words weigh like repeated ones.",
        "--dedupe near",
        by_row=False,
    ),
    "contradiction": Kind(
        "warning",
        "the same prompt with different answers",
        "The model learns a mixture of the answers, and no accuracy can reach 100 %.",
        by_row=False,
        unit="prompt",
    ),
    "overlap": Kind(
        "warning",
        "validation prompt that is also in training",
        "Validation then measures memory, and its loss looks better than the model is.",
        "--apart-from",
        by_row=False,
    ),
    "near_overlap": Kind(
        "warning",
        "validation row that is almost in training",
        "Validation then measures memory, and its loss looks better than the model is.",
        "--apart-from",
        by_row=False,
    ),
    # -- lengths -----------------------------------------------------------------------------------------------------
    "too_long": Kind(
        "warning",
        "longer than the model's training length",
        "The end of such a row, which is where the answer stands, would be cut off or the row refused.",
        "--drop too_long",
    ),
    "outlier": Kind(
        "note",
        "unlike the other rows",
        "Rows far longer, shorter or odder than the rest are often broken exports: look at them.",
        by_row=False,
    ),
    # -- answers and turns -------------------------------------------------------------------------------------------
    "blank_answer": Kind("warning", "blank answer", "Blank answers teach blank answers.", "--drop blank_answer"),
    "same_answers": Kind(
        "warning",
        "a preferred answer that equals the other",
        "Nothing tells the better answer from the worse one: the row teaches nothing.",
        "--drop same_answers",
    ),
    "odd_roles": Kind(
        "warning",
        "unusual roles or order of turns",
        "A served conversation will not look like this, so what is learnt here is not used there.",
        "--normalise-roles",
    ),
    "missing_system": Kind(
        "note",
        "no system message, where other rows have one",
        "Ask the model later the way it was trained: with the system message, or without.",
        by_row=False,
    ),
    "missing_user": Kind("note", "no user message", "Nothing is asked before the answer.", "--drop missing_user"),
    "label_balance": Kind(
        "note",
        "answers that look like classes, unevenly spread",
        "Rare classes are learnt badly, and accuracy hides it: look at each class by itself.",
        by_row=False,
        unit="class",
    ),
    # -- tools -------------------------------------------------------------------------------------------------------
    "undeclared_tool": Kind(
        "warning",
        "calls a tool that the row does not declare",
        "The model learns to invent tools.",
        "--drop undeclared_tool",
    ),
    "tool_arguments": Kind(
        "warning",
        "arguments that break their tool's schema",
        "The model learns to call tools wrongly.",
        "--drop tool_arguments",
    ),
    "tool_schema": Kind(
        "warning",
        "a tool whose parameters are no valid JSON Schema",
        "Calls of this tool cannot be checked, and constrained decoding cannot use it.",
        "--drop tool_schema",
    ),
    "double_encoded": Kind(
        "warning",
        "arguments encoded twice",
        "JSON text inside JSON text is learnt as text: the model will answer with it.",
        "--drop double_encoded",
    ),
    # -- texts -------------------------------------------------------------------------------------------------------
    "special_tokens": Kind(
        "warning",
        "spells a control token",
        "Luthier trains it as plain text; other programs read it as the end of a turn. It is mostly export residue.",
        "--drop special_tokens",
    ),
    "mixed_encodings": Kind(
        "warning",
        "characters that went through a wrong encoding",
        "Broken characters are learnt like any others.",
        "--drop mixed_encodings",
    ),
    "mixed_languages": Kind(
        "note",
        "another language than most rows, or than its own prompt",
        "The model may change language by itself: keep it only where it is meant.",
        by_row=False,
    ),
    "separators": Kind(
        "warning",
        "prompt without the ending that tells where the answer begins",
        "Without a template, only a fixed ending tells the model that the prompt is over.",
        "--add-separators",
        by_row=False,
    ),
    "end_markers": Kind(
        "note",
        "completion without the ending of the others",
        "Luthier ends each completion with the end token; other programs stop only at a fixed ending.",
        "--add-end-markers",
        by_row=False,
    ),
    "unknown_key": Kind("warning", "a key that no rule knows", "It is ignored: check that nothing needed is in it."),
    "other": Kind("warning", "worth a look", "Reading the file found something unusual."),
    # -- what should not leave the house -----------------------------------------------------------------------------
    "secret": Kind("warning", "a likely password or key", "A tuned model can say it to anybody who asks.", "--redact"),
    "personal_data": Kind(
        "warning",
        "likely personal data",
        "E-mail addresses, telephone and card numbers can be said again to anybody who asks.",
        "--redact",
    ),
}


@dataclass(frozen=True, slots=True)
class Finding:
    """One kind of finding in one file.

    `rows`: 1-based numbers of example records (at most SHOWN_ROWS, in file order), `details[i]`: what is the matter
    with rows[i]. `count`: how many rows there are in all (prompts or classes where the kind says so).
    `fix`: the command that mends it, None where a person has to look.
    """

    kind: str
    severity: Level
    count: int
    rows: list[int]
    message: str
    why: str
    fix: str | None
    file: str = ""
    details: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__dataclass_fields__}


@dataclass(slots=True)
class Report:
    """What was found. `format` is that of the first file; `statistics`: plain JSON values (see statistics.py); `fixes`:
    {"file", "command"} for each file of which one command mends several findings."""

    format: str | None
    records: int
    findings: list[Finding]
    statistics: dict[str, Any]
    problems: list[Problem] = field(default_factory=list)
    fixes: list[dict[str, str]] = field(default_factory=list)

    @property
    def worst(self) -> Level | None:
        found = {finding.severity for finding in self.findings}
        return next((level for level in LEVELS if level in found), None)

    @property
    def exit_code(self) -> int:
        """0: clean, or notes alone; 1: warnings; 2: errors."""
        return EXIT_CODES[self.worst]

    def json(self) -> dict[str, Any]:
        return {
            "format": self.format,
            "records": self.records,
            "findings": [finding.as_dict() for finding in self.findings],
            "fixes": self.fixes,
            "problems": [problem.as_dict() for problem in self.problems],
            "statistics": self.statistics,
        }


def plural_rows(count: int) -> str:
    return f"{count:,} row{'' if count == 1 else 's'}"


def make_finding(
    kind: str,
    file: Path,
    count: int,
    rows: Sequence[int],
    details: Sequence[str] = (),
    *,
    message: str = "",
    level: Level | None = None,
    fix: str | None = None,
) -> Finding:
    """A finding with its kind's words. `message` in place of the kind's title; `fix`: see proposals.py."""
    about = KINDS[kind]
    noun = about.unit if count == 1 else f"{about.unit}{'es' if about.unit.endswith('s') else 's'}"
    return Finding(
        kind,
        level or about.level,
        count,
        list(rows[:SHOWN_ROWS]),
        message or f"{count:,} {noun}: {about.title}",
        about.why,
        fix,
        str(file),
        list(details[:SHOWN_ROWS]),
    )
