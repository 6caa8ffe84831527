"""Training rows by the content they were rendered from, so that a run that starts or goes on renders nothing anew.

A kept entry is named by a hash of everything that decides the rows: the bytes and paths of the data, the base's files
(its tokenizer among them), the template, the length and what happens to longer rows, the weight of prompts, and the
code that renders. It is written whole or not at all; one that is damaged is rendered again. The oldest go when there
are too many. Data with problems is never kept, so a refusal always comes from the data itself.
Does not know: templates, formats, what rows are for.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import zipfile
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from luthier import data
from luthier.data import dataset
from luthier.data.dataset import Prepared, Progress, Rows
from luthier.data.read import hash_file
from luthier.data.render import Renderer
from luthier.settings import load_settings
from luthier.spec.data import Problem
from luthier.spec.job import Overlong
from luthier.spec.run import write_whole

LEAST = 256 * 1024  # bytes of data; less is rendered in a moment
KEPT_BYTES, KEPT_FILES = 2 * 2**30, 50
COUNTS = (
    "records", "dropped", "truncated", "lost_tokens", "lost_supervised", "longest", "files", "warning_count",
)  # fmt: skip


def prepare(
    paths: Sequence[str],
    renderer: Renderer,
    base_hash: str,
    *,
    max_length: int,
    overlong: Overlong = "error",
    pairs: bool = False,
    progress: Progress | None = None,
) -> Prepared:
    """As dataset.prepare; `base_hash` is that of the folder that the renderer's tokenizer came from.

    Raises what dataset.prepare raises.
    """
    fitting = {"max_length": max_length, "overlong": overlong, "pairs": pairs}
    sizes = [Path(path).stat().st_size for path in paths if Path(path).is_file()]
    if len(sizes) < len(paths) or sum(sizes) < LEAST:
        return dataset.prepare(paths, renderer, **fitting, progress=progress)  # type: ignore[arg-type]
    key = _key(paths, renderer, base_hash, fitting)
    place = load_settings().cache_dir / "rendered" / f"{key}.npz"
    with contextlib.suppress(OSError, EOFError, ValueError, KeyError, TypeError, zipfile.BadZipFile):
        found = _load(place)
        os.utime(place)
        if progress:
            progress(sum(sizes), sum(sizes))
        return found
    prepared = dataset.prepare(paths, renderer, **fitting, progress=progress)  # type: ignore[arg-type]
    if key == _key(paths, renderer, base_hash, fitting):  # nobody wrote to the files meanwhile
        with contextlib.suppress(OSError):  # a cache that cannot be written costs the next run its rendering
            place.parent.mkdir(parents=True, exist_ok=True)
            write_whole(place, _packed(prepared))
            _prune(place)
    return prepared


def _key(paths: Sequence[str], renderer: Renderer, base_hash: str, fitting: Mapping[str, object]) -> str:
    code = hashlib.sha256()
    for path in sorted(Path(data.__file__).parent.glob("*.py")):
        code.update(path.read_bytes())
    parts = [
        [[path, hash_file(Path(path))] for path in paths],
        base_hash, renderer.template.name, renderer.template.source, renderer.prompt_weight, dict(fitting),
        code.hexdigest(), version("tokenizers"), version("jinja2"),
    ]  # fmt: skip
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def _packed(prepared: Prepared) -> bytes:
    """The rows as flat arrays, the account of them as JSON, in one file."""
    rows = prepared.rows
    account = {name: getattr(prepared, name) for name in COUNTS}
    account |= {"warnings": [problem.as_dict() for problem in prepared.warnings], "digest": rows.digest()}
    account |= {"text": rows.text, "pairs": rows.pairs, "sides": rows.sides, "keys": [key.hex() for key in rows.keys]}
    file = io.BytesIO()
    np.savez(
        file,
        ids=np.concatenate([ids for ids, _ in rows]),
        weights=np.concatenate([weights for _, weights in rows]),
        lengths=np.array([len(ids) for ids, _ in rows], np.int64),
        places=np.array(rows.places, np.int64),
        account=np.frombuffer(json.dumps(account).encode(), np.uint8),
    )
    return file.getvalue()


def _load(place: Path) -> Prepared:
    """What `_packed` wrote. Raises OSError where there is none, ValueError kin where it is damaged."""
    with open(place, "rb") as file, np.load(file, allow_pickle=False) as arrays:
        ids, weights, lengths, places = (arrays[name] for name in ("ids", "weights", "lengths", "places"))
        account: dict[str, Any] = json.loads(arrays["account"].tobytes())
    rows = Rows(account["sides"])
    rows.text, rows.pairs = account["text"], account["pairs"]
    ends = np.cumsum(lengths).tolist()
    for end, length, (file, source), key in zip(ends, lengths.tolist(), places.tolist(), account["keys"], strict=True):
        rows.add(ids[end - length : end], weights[end - length : end], source, bytes.fromhex(key), file)
    if rows.digest() != account["digest"]:
        raise ValueError("the rows are not those that were kept")
    warnings = [Problem(**problem) for problem in account["warnings"]]
    return Prepared(rows, **{name: account[name] for name in COUNTS}, warnings=warnings)


def _prune(newest: Path) -> None:
    """Keep the entries used last, `newest` among them, as many as KEPT_FILES and KEPT_BYTES allow."""
    others = [path for path in newest.parent.glob("*.npz") if path != newest]
    known = sorted(((path.stat().st_mtime, path) for path in others), reverse=True)
    total = newest.stat().st_size
    for count, (_, path) in enumerate(known, 2):
        total += path.stat().st_size
        if count > KEPT_FILES or total > KEPT_BYTES:
            path.unlink(missing_ok=True)
