"""A thin client of the OpenAI API for the commands with --server: requests, and refusals as our own errors.

The server's message is what the user reads. Does not know: what any object means.
"""

from __future__ import annotations

import contextlib
import json
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import quote, urlsplit

import typer

from luthier.spec.errors import BadSetting, Broken, LuthierError, NotFound, NotNow, UserError

Server = Annotated[
    str | None, typer.Option("--server", metavar="URL", help="The server. Default: the variable OPENAI_BASE_URL.")
]
PIECE = 1 << 16
SILENCE = 120.0  # seconds that a server may say nothing
# What to do about a name that the server does not know, by the parameter that it names.
NEXT_STEPS = {
    "id": "`luthier files list` shows the files.",
    "training_file": "`luthier files list` shows the files.",
    "validation_file": "`luthier files list` shows the files.",
    "fine_tune_id": "`luthier jobs list` shows the jobs.",
    "alias": "`luthier models aliases` shows the aliases.",
    "model": "`luthier models list --server URL` shows the models.",
}
WAITING = frozenset({408, 429, 502, 503, 504})  # statuses that a later try may change


class Client:
    """Requests to one server with one key. Raises what `refusal` and `_reached` make of answers and failures."""

    def __init__(self, url: str, key: str | None) -> None:
        import httpx2

        self.url = url
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._http = httpx2.Client(base_url=url, headers=headers, timeout=httpx2.Timeout(SILENCE, connect=10.0))
        weakref.finalize(self, self._http.close)  # commands end in many ways, and all of them let go of it

    def get(self, path: str, **query: Any) -> dict[str, Any]:
        return self._json("GET", path, params={name: value for name, value in query.items() if value is not None})

    def post(self, path: str, body: Any = None) -> dict[str, Any]:
        return self._json("POST", path, json=body)

    def delete(self, path: str) -> dict[str, Any]:
        return self._json("DELETE", path)

    def upload(self, file: Path, purpose: str) -> dict[str, Any]:
        """The new file's object. Raises NotFound for no such file."""
        if not file.is_file():
            raise NotFound(f"No file {file}.", param="file", hint="Check the path.")
        with open(file, "rb") as handle:
            return self._json("POST", "/files", data={"purpose": purpose}, files={"file": (file.name, handle)})

    def pages(self, path: str, limit: int | None, **query: Any) -> Iterator[dict[str, Any]]:
        """The objects of a list, page after page; `limit` of them at most."""
        after, left = None, limit
        while left is None or left > 0:
            page = self.get(path, after=after, limit=min(100, left or 100), **query)
            yield from page["data"]
            left = None if left is None else left - len(page["data"])
            if not page.get("has_more") or not page["data"]:
                return
            after = page["data"][-1]["id"]

    def content(self, path: str) -> Iterator[bytes]:
        """The bytes of an answer, as they come."""
        with self._reached(), self._http.stream("GET", path) as answer:
            if answer.is_error:
                answer.read()
                raise refusal(answer.status_code, answer.text)
            yield from answer.iter_bytes(PIECE)

    def events(self, path: str, body: Any) -> Iterator[dict[str, Any]]:
        """Server-sent events of a POST until [DONE]. Raises for an error inside the stream, too."""
        with self._reached(), self._http.stream("POST", path, json=body) as answer:
            if answer.is_error:
                answer.read()
                raise refusal(answer.status_code, answer.text)
            for line in answer.iter_lines():
                if not line.startswith("data:"):
                    continue
                text = line[5:].strip()
                if text == "[DONE]":
                    return
                event: dict[str, Any] = json.loads(text)
                if "error" in event:
                    raise refusal(500, text)
                yield event

    def _json(self, method: str, path: str, **given: Any) -> dict[str, Any]:
        with self._reached():
            answer = self._http.request(method, path, **given)
        if answer.is_error:
            raise refusal(answer.status_code, answer.text)
        try:
            told = answer.json()
        except ValueError:
            told = None
        if not isinstance(told, dict):
            raise Broken(
                f"{self.url} does not speak the OpenAI API: it answered {method} {path} without a JSON object."
            )
        return told

    @contextlib.contextmanager
    def _reached(self) -> Iterator[None]:
        import httpx2

        try:
            yield
        except (httpx2.InvalidURL, httpx2.UnsupportedProtocol) as error:
            raise BadSetting(f"--server: {self.url!r} is no URL: {error}.", param="server") from error
        except httpx2.TransportError as error:
            raise NotNow(
                f"No answer from {self.url}: {str(error) or type(error).__name__}.",
                hint="Check that the server runs (luthier serve) and that --server or OPENAI_BASE_URL names it.",
                param="server",
            ) from error


def refusal(status: int, text: str) -> LuthierError:
    """The error that an answer with an error status is."""
    try:
        told = json.loads(text)["error"]
        message, param = str(told["message"]), told.get("param")
    except (ValueError, KeyError, TypeError):
        message, param = f"The server answered with status {status}.", None
    if status in WAITING:
        return NotNow(message, param=param)
    if status >= 500:
        return Broken(message, param=param)
    if status == 401:
        hint = "Set OPENAI_API_KEY to a key of this server (luthier keys create)."
        return UserError(message, hint=hint, param=param)
    if message.startswith("Invalid URL"):
        return NotFound(message, hint="Check --server: it ends in /v1, or after the port.", param=param)
    step = NEXT_STEPS.get(str(param))
    return NotFound(message, hint=step, param=param) if status == 404 else UserError(message, hint=step, param=param)


def connect(server: str | None) -> Client:
    """A client of --server or OPENAI_BASE_URL with OPENAI_API_KEY. Raises BadSetting when neither names a server."""
    from luthier.settings import client_environment

    base, key = client_environment()
    url = server or base
    if not url:
        raise BadSetting(
            "No server is named.",
            hint="Give --server http://127.0.0.1:8080, or set OPENAI_BASE_URL.",
            param="server",
        )
    parts = urlsplit(url if "//" in url else f"http://{url}")
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise BadSetting(f"--server: found {url!r}, wanted http://HOST:PORT.", param="server")
    path = parts.path.rstrip("/") or "/v1"
    if key is not None and not (key.isascii() and key.isprintable()):
        raise BadSetting("OPENAI_API_KEY holds characters that no key has.", param="key")
    return Client(f"{parts.scheme}://{parts.netloc}{path}", key)


def segment(name: str) -> str:
    """`name` as one piece of a path, whatever it holds. Raises NotFound for none."""
    if not name.strip("."):
        raise NotFound(f"There is nothing named {name!r}.", param="id")
    return quote(name, safe="", errors="replace")
