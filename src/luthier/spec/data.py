"""What a training record can be, whatever file it came from: a chat, a prompt with its completion, or plain text.

Records are small frozen dataclasses, not pydantic models: a file of a million rows makes millions of them.
Does not know: file formats (data/formats.py), tokens (data/render.py).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

Role = Literal["system", "developer", "user", "assistant", "tool"]
ROLES: tuple[Role, ...] = ("system", "developer", "user", "assistant", "tool")
Severity = Literal["error", "warning"]


@dataclass(frozen=True, slots=True)
class ToolCall:
    """One call an assistant turn makes. `arguments` is the decoded JSON value, usually an object."""

    name: str
    arguments: Any
    id: str | None = None


@dataclass(frozen=True, slots=True)
class Message:
    """One turn. `content` is never None here: a null beside tool calls has become "".

    `weight` is 1 when an assistant turn is to be learnt and 0 when it is context; it means nothing on other roles.
    """

    role: Role
    content: str
    name: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None
    weight: int = 1


@dataclass(frozen=True, slots=True)
class Chat:
    """A conversation. `tools` are OpenAI tool objects exactly as the file had them (no key added, none lost)."""

    messages: tuple[Message, ...]
    tools: tuple[dict[str, Any], ...] = ()
    line: int = 0
    row: int = 0


@dataclass(frozen=True, slots=True)
class Completion:
    """A prompt and what should follow it; no chat template is involved and neither text is altered."""

    prompt: str
    completion: str
    line: int = 0
    row: int = 0


@dataclass(frozen=True, slots=True)
class Text:
    """Plain text for continued pre-training. `ends` is False when the same document goes on in the next record."""

    text: str
    ends: bool = True
    line: int = 0
    row: int = 0


Example = Chat | Completion | Text


@dataclass(frozen=True, slots=True)
class Preference:
    """A conversation up to a question, and two ways to go on: one that is preferred, and one that is not.

    Each answer is assistant messages, with the tool results between them if there are calls.
    """

    prompt: tuple[Message, ...]
    preferred: tuple[Message, ...]
    rejected: tuple[Message, ...]
    tools: tuple[dict[str, Any], ...] = ()
    line: int = 0
    row: int = 0


@dataclass(frozen=True, slots=True)
class Problem:
    """One finding in a data file.

    `line` is the 1-based physical line, `row` the 1-based record number (0 when the file has no such record);
    `field` a path such as `messages[2].content`; `found` and `wanted` are short phrases; `hint` is the next step.
    """

    line: int
    field: str
    found: str
    wanted: str
    hint: str = ""
    row: int = 0
    severity: Severity = "error"
    file: str = ""

    def __str__(self) -> str:
        place = f"{self.file}: " if self.file else ""
        place += f"line {self.line}" if self.line else "file"
        if self.row and self.row != self.line:
            place += f" (row {self.row})"
        where = f", {self.field}" if self.field else ""
        tail = f" {self.hint}" if self.hint else ""
        return f"{place}{where}: found {self.found}, wanted {self.wanted}.{tail}"

    def as_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__dataclass_fields__}


@dataclass(slots=True)
class Rendered:
    """One training row after rendering: `ids[i]` carries loss weight `weights[i]` (0 = context, 1 = learnt; below 1:
    a prompt token that is learnt a little, see Renderer.load).

    A weight says how much *predicting* that token counts, so position 0 never has one. `source` is the record's
    row number; one record can become several rendered rows (a long text, or a template that rewrites history).
    """

    ids: list[int]
    weights: list[float]
    source: int = 0
    line: int = 0
    notes: list[str] = field(default_factory=list)

    @property
    def supervised(self) -> int:
        """Tokens of the answer."""
        return sum(1 for weight in self.weights if weight >= 1)
