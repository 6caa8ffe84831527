"""Which model a name means, and how it is spoken to: the replica to ask, the adapter, the renderer, the context.

Renderers are kept by the content of the files that make them, so all adapters of one base share one.
Does not know: requests, HTTP.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

from luthier.api.errors import ApiError, translate
from luthier.api.models import no_such_model
from luthier.api.services import Services
from luthier.data.render import Renderer
from luthier.spec.errors import LuthierError, NotFound
from luthier.store.models import Model

KEPT_RENDERERS = 8
KEPT_FOLDERS = 1024
DEFAULT_CONTEXT = 2048
FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "generation_config.json",
    "config.json",
)


@dataclass(frozen=True, slots=True)
class Spoken:
    """A renderer, which renders one request at a time: whoever uses its template holds `lock`."""

    renderer: Renderer
    lock: threading.Lock
    digest: str


@dataclass(frozen=True, slots=True)
class Voice:
    """A model that can be asked. `name` is the one it was asked by, `base` the router's name of its base, `adapter`
    the folder over it (None: none), `content` a hash of what it is; `context` in tokens, answer included."""

    name: str
    base: str
    adapter: Path | None
    content: str
    spoken: Spoken
    context: int


class _Shelf:
    """Renderers, the least recently used ones dropped. Safe between threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._digests: OrderedDict[tuple[str, str], str] = OrderedDict()
        self._renderers: OrderedDict[str, Spoken] = OrderedDict()

    def get(self, folder: Path, content: str) -> Spoken:
        """Raises LuthierError for a folder that cannot be spoken to."""
        key = (str(folder), content)
        with self._lock:
            digest = self._digests.get(key) or _digest(folder)
            self._digests[key] = digest
            self._digests.move_to_end(key)
            if digest not in self._renderers:
                self._renderers[digest] = Spoken(Renderer.load(folder), threading.Lock(), digest)
            self._renderers.move_to_end(digest)
            while len(self._renderers) > KEPT_RENDERERS:
                self._renderers.popitem(last=False)
            while len(self._digests) > KEPT_FOLDERS:
                self._digests.popitem(last=False)
            return self._renderers[digest]


_SHELF = _Shelf()


def find_voice(services: Services, name: str) -> Voice:
    """The model that `name` means. Blocks on the store and on files. Raises ApiError 404, and 400 or 503 for a model
    whose folder cannot be used."""
    try:
        model: Model | None = services.aliases.resolve(name)
    except NotFound:
        model = None
    try:
        return _tuned(services, model) if model is not None else _base(services, name)
    except LuthierError as error:
        raise translate(error, param="model") from error


def _tuned(services: Services, model: Model) -> Voice:
    if not model.folder.is_dir():  # deleted at this moment
        raise no_such_model(model.name)
    spoken = _SHELF.get(model.folder, model.content_hash)
    if not (model.folder / "adapter_config.json").is_file():
        context = context_of(model.folder)
        return Voice(model.name, f"folder:{model.folder}", None, model.content_hash, spoken, context)
    base = services.folders.get(model.base)
    if base is None:
        raise ApiError(
            404,
            f"The model `{model.name}` needs the base {model.base}, which this server does not offer now.",
            param="model",
            code="model_not_found",
        )
    return Voice(model.name, model.base, model.folder, model.content_hash, spoken, context_of(base))


def _base(services: Services, name: str) -> Voice:
    try:
        base = services.bases.resolve(name)
    except NotFound:
        raise no_such_model(name) from None
    folder = services.folders.get(base)
    if folder is None:
        raise no_such_model(name)
    spoken = _SHELF.get(folder, "")
    return Voice(name, base, None, spoken.digest, spoken, context_of(folder))


def context_of(folder: Path) -> int:
    """Tokens that the model in `folder` reads at most, by its config.json."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return DEFAULT_CONTEXT
    inner = config.get("text_config") if isinstance(config.get("text_config"), dict) else {}
    for holder in (inner, config):
        for key in ("max_position_embeddings", "n_positions"):
            if isinstance(holder.get(key), int):
                return int(holder[key])
    return DEFAULT_CONTEXT


def _digest(folder: Path) -> str:
    whole = hashlib.sha256()
    for name in FILES:
        path = folder / name
        content = path.read_bytes() if path.is_file() else b""
        whole.update(f"{name} {len(content)}\n".encode() + content)
    return whole.hexdigest()
