"""`template="auto"`: data with tools are trained by a template that can say them; other data by the model's own."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from luthier.data.template import BUILT_IN
from tests.engine.runs import chats, events, refused, train, write

TOOL = {"type": "function", "function": {"name": "takeoff", "parameters": {"type": "object", "properties": {}}}}
CALL = {"id": "call_1", "type": "function", "function": {"name": "takeoff", "arguments": '{"altitude": 10}'}}


def with_tools(count: int) -> list[dict[str, Any]]:
    asked = [{"role": "user", "content": f"go {n}"} for n in range(count)]
    return [{"messages": [one, {"role": "assistant", "tool_calls": [CALL]}], "tools": [TOOL]} for one in asked]


def test_tools_that_the_own_template_cannot_say(tiny: Path, tmp_path: Path) -> None:
    data = write(tmp_path / "tools.jsonl", with_tools(4))
    run = train(tmp_path / "run", tiny, data, template="auto", epochs=1)
    assert (run.model / "chat_template.jinja").read_text() == BUILT_IN["chatml"]
    assert any("ChatML is used" in event["message"] for event in events(run, "warning"))
    assert "'takeoff' is lost" in refused(tmp_path / "without", tiny, data, epochs=1)["message"]


def test_the_own_template_stays_where_it_can_say_everything(tiny: Path, tmp_path: Path) -> None:
    own = (tiny / "chat_template.jinja").read_text()
    plain = train(tmp_path / "plain", tiny, write(tmp_path / "chats.jsonl", chats(4)), template="auto", epochs=1)
    assert (plain.model / "chat_template.jinja").read_text() == own
    able = tmp_path / "able"
    shutil.copytree(tiny, able)
    (able / "chat_template.jinja").write_text(BUILT_IN["chatml"] + "{# its own #}")
    run = train(tmp_path / "run", able, write(tmp_path / "tools.jsonl", with_tools(4)), template="auto", epochs=1)
    assert (run.model / "chat_template.jinja").read_text().endswith("{# its own #}")
