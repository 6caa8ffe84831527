"""`luthier chat --server`: what is sent, what is printed, refusals; against a server that plays its part."""

from __future__ import annotations

import io
import json
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar

import pytest

from tests.cli.test_server_commands import called


class Played(BaseHTTPRequestHandler):
    asked: ClassVar[list[tuple[str, dict[str, Any]]]] = []
    finish: ClassVar[str] = "stop"
    refuse: ClassVar[dict[str, Any] | None] = None

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.asked.append((self.path, body))
        self.send_response(400 if self.refuse else 200)
        self.end_headers()
        if self.refuse:
            self.wfile.write(json.dumps({"error": self.refuse}).encode())
            return
        said = f"It is {body['messages'][-1]['content']}é."
        chunks: list[dict[str, Any]] = [
            {"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}]},
            *({"choices": [{"index": 0, "delta": {"content": letter}, "finish_reason": None}]} for letter in said),
            {"choices": [{"index": 0, "delta": {}, "finish_reason": self.finish}]},
            {"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 4}},
        ]
        for chunk in chunks:
            self.wfile.write(f"data: {json.dumps(chunk)}\n\n".encode())
        self.wfile.write(b"data: [DONE]\n\n")

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-x")
    monkeypatch.setattr(Played, "asked", [])
    with ThreadingHTTPServer(("127.0.0.1", 0), Played) as made:
        thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield f"http://127.0.0.1:{made.server_address[1]}"
        made.shutdown()
        thread.join()


def test_a_conversation(server: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert called(
        "chat", "ft:a", "--server", server, "-m", "one", "-m", "two", "--system", "Be brief.", "--temperature", "0.5",
        "--top-p", "0.9", "--max-tokens", "7", "--seed", "3",
    ) == 0  # fmt: skip
    assert capsys.readouterr().out == "It is oneé.\nIt is twoé.\n"
    (path, first), (_, second) = Played.asked
    assert path == "/v1/chat/completions"
    assert first == {
        "model": "ft:a", "stream": True, "stream_options": {"include_usage": True},
        "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "one"}],
        "max_tokens": 7, "temperature": 0.5, "top_p": 0.9, "seed": 3,
    }  # fmt: skip
    assert second["messages"][1:] == [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "It is oneé."},
        {"role": "user", "content": "two"},
    ]


def test_as_json(server: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert called("chat", "m", "--server", server, "-m", "x", "--json") == 0
    assert json.loads(capsys.readouterr().out) == {
        "content": "It is xé.", "finish_reason": "stop", "prompt_tokens": 3, "completion_tokens": 4,
    }  # fmt: skip


def test_lines_of_stdin(server: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("a\n\nb\n/reset\nc\n"))
    monkeypatch.setattr(Played, "finish", "length")
    assert called("chat", "m", "--server", server) == 0
    told = capsys.readouterr()
    assert told.out == "It is aé.\nIt is bé.\nIt is cé.\n"
    assert told.err.count("--max-tokens allows more") == 3
    assert [len(body["messages"]) for _, body in Played.asked] == [1, 3, 1]


def test_a_refusal(server: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(Played, "refuse", {"message": "Too long.", "param": "messages"})
    assert called("chat", "m", "--server", server, "-m", "x", "--json") == 2
    told = json.loads(capsys.readouterr().out)
    assert (told["message"], told["param"]) == ("Too long.", "messages")


@pytest.mark.parametrize("option", [("--template", "chatml"), ("--precision", "float32")])
def test_what_is_the_servers(option: tuple[str, str], server: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert called("chat", "m", "--server", server, "-m", "x", *option) == 2
    assert "the server's to choose" in capsys.readouterr().err
    assert Played.asked == []
