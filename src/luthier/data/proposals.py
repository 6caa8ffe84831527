"""The commands that mend what was found, as they can be typed: each runs, and what it mends is then gone.

Where a command would be refused (a text has no rows; nothing would be left) none is proposed, and a person has to look.
Does not know: what the commands do (fix.py, convert.py), how findings are found (doctor.py).
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from luthier.data import conversions
from luthier.data.columns import Columns
from luthier.data.findings import KINDS, Finding
from luthier.data.read import MAX_RECORD

ROLES = "--normalise-roles"
_NEEDS_MODEL = frozenset({"unrenderable", "nothing_supervised", "too_long", "special_tokens"})
_OVER_FILES = frozenset({"overlap", "near_overlap"})
_TEXT = "--to text"


@dataclass(frozen=True, slots=True)
class Proposer:
    """What the commands for one file need to know. `model`: the words that name the model, "" for none; `training`:
    the files that a validation file is compared with."""

    path: Path
    columns: Columns
    model: str = ""
    training: Sequence[Path] = ()

    def mended(self, finding: Finding) -> Finding:
        """The finding with its command, if there is one."""
        return replace(finding, fix=self._command(finding))

    def together(self, findings: Sequence[Finding]) -> str | None:
        """One command that mends all that `luthier data fix` can of these; None for fewer than two."""
        options = [self._options(finding) for finding in findings]
        words = list(dict.fromkeys(option for each in options if each for option in each))
        if len([each for each in options if each]) < 2 or self._left(findings) <= 0:
            return None
        if "--dedupe near" in words:
            words = [word for word in words if word != "--dedupe exact"]
        model = self.model if any(finding.kind in _NEEDS_MODEL and finding.fix for finding in findings) else ""
        return self._fix(words, model)

    def _left(self, findings: Sequence[Finding]) -> int:
        """Rows that stay at least."""
        gone = sum(finding.count for finding in findings if KINDS[finding.kind].mend.startswith(("--drop", "--dedupe")))
        return self.columns.records - gone

    def _command(self, finding: Finding) -> str | None:
        if finding.kind == "convert":
            return finding.fix
        if finding.kind == "unknown_key":
            return self._without_keys()
        options = self._options(finding)
        if not options:
            return None
        return self._fix(options, self.model if finding.kind in _NEEDS_MODEL else "")

    def _options(self, finding: Finding) -> list[str]:
        """The options of `luthier data fix` for a finding; [] where that command would refuse them."""
        kind, mend = finding.kind, KINDS[finding.kind].mend
        if kind in _OVER_FILES:
            mend = " ".join(f"--apart-from {shlex.quote(str(path))}" for path in self.training)
        if not mend or not self.columns.examples or (self._plain() and mend != "--redact"):
            return []
        unreadable = self.columns.tallies.get("unreadable")
        if unreadable is not None and (self.columns.cut_short or not self.columns.records):
            return []
        made = [mend]
        chat = self.columns.format == "chat"
        if kind == "odd_roles":
            made = [ROLES, "--drop odd_roles"] if chat else ["--drop odd_roles"]
        elif kind == "invalid" and chat and any(".role:" in detail for detail in finding.details):
            made = [ROLES, mend]
        if mend.startswith(("--drop", "--apart")) and finding.count >= self.columns.records:
            return []
        if unreadable is not None and kind != "unreadable":
            made.append("--drop unreadable")
        return made

    def _plain(self) -> bool:
        return self.path.suffix.lower() == ".txt"

    def _fix(self, options: Sequence[str], model: str) -> str | None:
        source, before = self.path, ""
        if self._plain():
            if self.path.stat().st_size > MAX_RECORD:
                return None
            source = conversions.converted(self.path)
            before = f"{conversions.command(self.path, _TEXT)} && "
        return before + fix_command(source, " ".join([*options, model] if model else options))

    def _without_keys(self) -> str | None:
        """Other keys are left out by a conversion to the file's own format."""
        columns = self.columns
        target = {"conversational": "chat", "moss": None}.get(columns.format or "moss", columns.format)
        if target is None or "invalid" in columns.tallies or "unreadable" in columns.tallies:
            return None
        return conversions.command(self.path, f"--to {target} --drop-extra")


def fixed(path: Path) -> Path:
    """Where the mended file goes: beside `path`."""
    return path.with_name(f"{path.stem}.fixed.jsonl")


def fix_command(path: Path, options: str) -> str:
    return f"luthier data fix {shlex.quote(str(path))} {options} -o {shlex.quote(str(fixed(path)))}"
