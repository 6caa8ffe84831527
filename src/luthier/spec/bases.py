"""The bases that this server offers and the names that lead to them: `gpt-4o-mini` may mean a local model.

Server and workers read the same configuration, so a job's alias comes to the same base on both.
Does not know: where weights lie (engine/catalogue.py), HTTP.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from luthier.spec.errors import NotFound

DEFAULT_BASE = "smollm2-135m-instruct"
# Prefixes of OpenAI's own names; old scripts run unchanged when each means some local base.
OPENAI_NAMES = ("gpt-", "chatgpt-", "o1", "o3", "o4", "davinci", "curie", "babbage", "ada", "text-")


@dataclass(frozen=True, slots=True)
class Bases:
    """`sources`: public name of a base -> what the engine loads (catalogue name, absolute folder or Hub id).
    `aliases`: other names -> a public name. Any of OPENAI_NAMES without an alias means `default`."""

    sources: Mapping[str, str] = field(default_factory=lambda: {DEFAULT_BASE: DEFAULT_BASE})
    aliases: Mapping[str, str] = field(default_factory=dict)
    default: str = DEFAULT_BASE

    def resolve(self, asked: str) -> str:
        """The public name of the base that `asked` means. Raises NotFound (param model)."""
        if asked in self.sources:
            return asked
        if asked in self.aliases:
            return self.aliases[asked]
        if asked.startswith(OPENAI_NAMES) and ":" not in asked:  # with a colon it is a tuned model, perhaps a gone one
            return self.default
        raise NotFound(
            f"The model `{asked[:200]}` does not exist or you do not have access to it.",
            param="model",
            hint=f"Bases here: {', '.join(sorted(self.sources))}.",
        )


def read_pairs(text: str, what: str) -> dict[str, str]:
    """`a=b,c` -> {a: b, c: c}. Raises ValueError naming the piece without a name."""
    pairs = {}
    for piece in filter(None, (piece.strip() for piece in text.split(","))):
        name, _, value = piece.partition("=")
        if not name:
            raise ValueError(f"{what}: found {piece!r}, wanted NAME or NAME=VALUE, separated by commas")
        pairs[name.strip()] = value.strip() or name.strip()
    return pairs
