"""`luthier chat --server`: the conversation of chat.py, answered by a server.

Does not know: templates and tokens, which are the server's.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from luthier.cli.chat import note, refuse_broken_text, told
from luthier.cli.output import print_json, visible

if TYPE_CHECKING:
    from luthier.cli.client import Client


@dataclass
class RemoteConversation:
    """The messages so far, and the server that answers them. `options` go with every request."""

    client: Client
    model: str
    options: dict[str, Any]
    system: str | None = None
    as_json: bool = False
    turns: list[dict[str, Any]] = field(default_factory=list)

    def answer(self, text: str) -> None:
        """Ask `text` and print the answer as it comes. Both are kept, unless the server refuses.

        Ctrl-C ends the answer where it is. Raises what Client raises.
        """
        for words in (text, self.system or ""):
            refuse_broken_text(words)
        system = [{"role": "system", "content": self.system}] if self.system else []
        asked = {"role": "user", "content": text}
        body = {
            "model": self.model,
            "messages": [*system, *self.turns, asked],
            "stream": True,
            "stream_options": {"include_usage": True},
            **self.options,
        }
        said, reason = "", "interrupted"
        usage: dict[str, Any] = {}
        try:
            for chunk in self.client.events("/chat/completions", body):
                usage = chunk.get("usage") or usage
                for choice in chunk.get("choices") or ():
                    piece = choice["delta"].get("content") or ""
                    said += piece
                    reason = choice.get("finish_reason") or reason
                    if not self.as_json:
                        told(piece)
        except KeyboardInterrupt:
            reason = "interrupted"
        if said or reason != "interrupted":
            self.turns += [asked, {"role": "assistant", "content": said}]
        self._tell(said, reason, usage)

    def _tell(self, said: str, reason: str, usage: dict[str, Any]) -> None:
        if self.as_json:
            counts = {name: usage.get(name) for name in ("prompt_tokens", "completion_tokens")}
            print_json({"content": said, "finish_reason": reason, **counts})
            return
        told("" if said.endswith("\n") else "\n")
        if reason == "length":
            note(visible("(cut; --max-tokens allows more)"))
        elif reason == "interrupted":
            note("(stopped)")
