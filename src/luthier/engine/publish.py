"""Write a finished model so that it can be used anywhere, and prove that it is whole before it appears.

The folder is laid out beside its place, checked, synced and renamed. `dry_run` does all of it that needs no trained
weights, before the first step, so that hours of training cannot end in a save that was never going to work.
Does not know: how the weights were trained, whether they are good (evaluate.py).
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import AutoTokenizer, GenerationConfig

import luthier
from luthier.engine import adapters
from luthier.engine.adapters import Start, fingerprint
from luthier.engine.sources import read_json
from luthier.spec.errors import LuthierError, NotNow, UserError
from luthier.spec.job import TrainRequest
from luthier.spec.run import fsync_directory, is_full, write_json

__all__ = ["Start", "dry_run", "fingerprint", "generation_settings", "publish"]

SAMPLING = ("temperature", "top_p", "top_k", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff", "top_h")
COPIED = ("tokenizer.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json")


def dry_run(
    model: nn.Module,
    *,
    request: TrainRequest,
    base_folder: Path,
    template: str | None,
    stop_ids: Sequence[int],
    pad_id: int,
    out: Path,
) -> list[str]:
    """Write everything but the weights into a folder beside `out`, read it back, remove it. Call before step 1.

    Returns notes on what the result will have otherwise than its base (generation settings that contradict each
    other). Raises NotNow when the place cannot be written or has too little room, UserError when the tokenizer with
    this template cannot be read back.
    """
    work = _work_folder(out)
    try:
        notes = _write_side_files(work, base_folder, template, stop_ids, pad_id)
        _check_tokenizer(work, template)
        need = _bytes_needed(model, request)
        free = shutil.disk_usage(work).free
        if free < need:
            raise NotNow(
                f"The disk of {out.parent} is too full for the result: it needs {need / 1e6:.0f} MB, "
                f"{free / 1e6:.0f} MB are free.",
                hint="Free some space or choose another --out.",
                param="out",
            )
    except OSError as error:
        raise _cannot_write(out, error) from error
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return notes


def publish(
    model: nn.Module,
    *,
    request: TrainRequest,
    base_folder: Path,
    base_hash: str,
    template: str | None,
    stop_ids: Sequence[int],
    pad_id: int,
    initial: Start,
    out: Path,
    weights: Mapping[str, torch.Tensor] | None = None,
    base_name: str | None = None,
    must_differ: bool = True,
) -> list[str]:
    """Write the result to `out` (replaced whole when it exists) and return notes, as `dry_run` does.

    `weights`: the learnt values by parameter name (float32 masters); default: the model's own. An adapter is saved
    in float32; a full model in its own dtype, and `model` is left holding exactly what was saved. Raises UserError,
    with the weights kept in a `.rejected` folder that the message names, when a saved weight is not finite or, if it
    `must_differ`, none changed since `initial` (from `fingerprint`); NotNow when the disk refuses.
    """
    learnt = dict(weights if weights is not None else _own(model))
    work = _work_folder(out)
    try:
        notes = _write_side_files(work, base_folder, template, stop_ids, pad_id)
        if request.uses_adapter:
            save_file(adapters.state_of(model, learnt, initial), work / adapters.WEIGHTS, metadata={"format": "pt"})
            write_json(work / adapters.CONFIG, adapters.config_of(model, base_folder))
        else:
            _write_full(work, model, learnt)
        wrong = _what_is_wrong(work, model, learnt, initial if must_differ else None, request.uses_adapter)
        if wrong is not None:
            raise _rejected(work, out, *wrong)
        base = {"name": base_name or request.model, "folder": str(base_folder), "hash": base_hash}
        _write_note(work, "adapter" if request.uses_adapter else "model", request.method, base)
        _move_into_place(work, out)
    except OSError as error:
        raise _cannot_write(out, error) from error
    except SafetensorError as error:  # how safetensors reports a disk that refuses
        raise _cannot_write(out, OSError(str(error))) from error
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return notes


def replace(out: Path, source: Path, kept: Path, model: Any, adapter: bool, scale: float) -> None:
    """`out` becomes the model in `source` at `scale`, whole at every instant; the model at scale 1 is kept in `kept`.

    An adapter's scale goes into its alpha, so its weights keep their bytes; of a full model `model` holds the weights
    to write. Raises NotNow when the disk refuses.
    """
    if not kept.exists():
        copy = _work_folder(kept)
        shutil.copytree(source, copy, dirs_exist_ok=True)
        _move_into_place(copy, kept)
    work = _work_folder(out)
    try:
        shutil.copytree(kept, work, dirs_exist_ok=True)
        note = read_json(work / adapters.NOTE)
        (work / adapters.NOTE).unlink()
        if adapter:
            config = read_json(work / adapters.CONFIG)
            config["lora_alpha"] = config["lora_alpha"] * scale
            config["alpha_pattern"] = {name: value * scale for name, value in config.get("alpha_pattern", {}).items()}
            write_json(work / adapters.CONFIG, config)
        elif scale != 1.0:
            _write_full(work, model, {})
        _write_note(work, note["kind"], note["method"], note["base"], scale)
        _move_into_place(work, out)
    except OSError as error:
        raise _cannot_write(out, error) from error
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _own(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: weight.detach() for name, weight in model.named_parameters() if weight.requires_grad}


def _work_folder(out: Path) -> Path:
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        for left in out.parent.glob(f".{out.name}.*.work"):  # of a killed run; the run's lock is ours
            shutil.rmtree(left, ignore_errors=True)
        return Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".work", dir=out.parent))
    except OSError as error:
        raise _cannot_write(out, error) from error


def _cannot_write(out: Path, error: OSError) -> NotNow:
    return NotNow(
        f"The result cannot be written to {out}: {error.strerror or error}.",
        hint="Free some space there." if is_full(error) else "Choose a folder that you may write to with --out.",
        param="out",
    )


def _bytes_needed(model: nn.Module, request: TrainRequest) -> int:
    if request.uses_adapter:
        twice = 2 if request.method == "pissa" else 1
        weights = sum(4 * twice * weight.numel() for weight in model.parameters() if weight.requires_grad)
    else:
        weights = sum(weight.numel() * weight.element_size() for weight in model.parameters())
    copies = 2 + request.publish_checkpoints if request.publish_checkpoints else 1  # one more while it is written
    return copies * weights + 50_000_000


# Side files


def _write_side_files(
    work: Path, base_folder: Path, template: str | None, stop_ids: Sequence[int], pad_id: int
) -> list[str]:
    for name in COPIED:
        if (base_folder / name).is_file():
            shutil.copyfile(base_folder / name, work / name)
    _write_tokenizer_config(work, base_folder, template)
    values, notes = generation_settings(base_folder, stop_ids, pad_id)
    write_json(work / "generation_config.json", values)
    return notes


def _write_tokenizer_config(work: Path, base_folder: Path, template: str | None) -> None:
    """The base's settings with the training template in both places where readers look for it."""
    source = base_folder / "tokenizer_config.json"
    config = read_json(source) if source.is_file() else {"tokenizer_class": "PreTrainedTokenizerFast"}
    config.pop("chat_template", None)
    if template is not None:
        config["chat_template"] = template
        (work / "chat_template.jinja").write_bytes(template.encode())
    write_json(work / "tokenizer_config.json", config)


def generation_settings(base_folder: Path, stop_ids: Sequence[int], pad_id: int) -> tuple[dict[str, Any], list[str]]:
    """generation_config.json of the result: the base's, freed of contradictions, stopping at every id in `stop_ids`.

    The notes say what was left out and why.
    """
    source = base_folder / "generation_config.json"
    values = read_json(source) if source.is_file() else {}
    notes: list[str] = []
    if not values.get("do_sample"):
        dropped = [key for key in SAMPLING if values.pop(key, None) is not None]
        if dropped:
            notes.append(
                f"generation_config.json: {', '.join(dropped)} of the base left out, as it does not sample "
                "(do_sample is not true)."
            )
    values["eos_token_id"] = list(stop_ids) if len(stop_ids) > 1 else next(iter(stop_ids), None)
    values["pad_token_id"] = pad_id
    for key in ("transformers_version", "_from_model_config"):
        values.pop(key, None)
    try:
        GenerationConfig(**values).validate(strict=True)
    except (ValueError, TypeError) as error:
        kept: dict[str, Any] = {
            key: values[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if key in values
        }
        reason = str(error).strip().splitlines()[0]
        notes.append(f"generation_config.json: only the token ids of the base kept, the rest is invalid ({reason}).")
        values = kept
    return values, notes


def _check_tokenizer(work: Path, template: str | None) -> None:
    try:
        found = AutoTokenizer.from_pretrained(work, local_files_only=True, trust_remote_code=False).chat_template
    except (ValueError, OSError, KeyError, TypeError) as error:
        raise UserError(f"The tokenizer of the base cannot be saved and read back: {error}", param="model") from error
    if found != template:
        raise UserError(
            "The chat template does not survive saving: it reads back differently.",
            hint="Write it with plain line ends (\\n) and no surrounding whitespace.",
            param="template",
        )


# Weights


@torch.no_grad()
def _write_full(work: Path, model: Any, learnt: Mapping[str, torch.Tensor]) -> None:
    """The whole model; tied weights are one tensor in memory, so they stay tied in the file."""
    own = dict(model.named_parameters())
    for name, value in learnt.items():
        own[name].copy_(value)
    keeps_cache, model.config.use_cache = model.config.use_cache, True
    keeps, model.generation_config = model.generation_config, GenerationConfig()
    side = (work / "generation_config.json").read_bytes()
    try:
        model.save_pretrained(work)
    finally:
        model.config.use_cache, model.generation_config = keeps_cache, keeps
    (work / "generation_config.json").write_bytes(side)


def _what_is_wrong(
    work: Path, model: nn.Module, learnt: Mapping[str, torch.Tensor], initial: Start | None, adapter: bool
) -> tuple[str, str] | None:
    """What the saved files show: (sentence, next step), or None when they can be published."""
    for path in sorted(work.glob("*.safetensors")):
        with safe_open(path, "pt") as opened:
            for key in opened.keys():  # noqa: SIM118 - not a dict
                if not torch.isfinite(opened.get_tensor(key)).all():
                    return (
                        f"{key} holds values that are not finite: the training diverged.",
                        "Lower --learning-rate, and look at the losses in metrics.csv.",
                    )
    if initial is None:
        return None
    now = learnt if adapter else _own(model)
    if all(adapters.value_hash(now[name]) == known for name, known in initial.hashes.items()):
        return (
            "No weight differs from what it was before training.",
            "Raise --learning-rate (a full bfloat16 model forgets changes below 1/256 of a weight), or train longer.",
        )
    return None


def _rejected(work: Path, out: Path, sentence: str, hint: str) -> LuthierError:
    place = out.with_name(f"{out.name}.rejected")
    number = 2
    while place.exists():
        place = out.with_name(f"{out.name}.rejected-{number}")
        number += 1
    work.rename(place)
    return UserError(f"The result was not published. {sentence} The weights are kept in {place}.", hint=hint)


def _write_note(work: Path, kind: str, method: str, base: dict[str, str], scale: float = 1.0) -> None:
    files = {}
    for path in sorted(work.iterdir()):
        with open(path, "rb") as handle:
            digest = hashlib.file_digest(handle, "sha256").hexdigest()
        files[path.name] = {"bytes": path.stat().st_size, "sha256": digest}
    packages = {name: version(name) for name in ("torch", "transformers", "peft", "safetensors")}
    note: dict[str, Any] = {
        "kind": kind,
        "method": method,
        "base": base,
        "versions": {"luthier": luthier.__version__, **packages},
        "files": files,
    }
    if scale != 1.0:
        note["scale"] = scale
    write_json(work / adapters.NOTE, note)


def _move_into_place(work: Path, out: Path) -> None:
    for path in work.iterdir():
        path.chmod(0o644)
        with open(path, "rb") as handle:
            os.fsync(handle.fileno())
    work.chmod(0o755)
    fsync_directory(work)
    if out.exists() and _exchanged(work, out):
        shutil.rmtree(work)
    elif out.exists():
        old = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".work", dir=out.parent))
        out.rename(old / "old")
        work.rename(out)
        shutil.rmtree(old)
    else:
        work.rename(out)
    fsync_directory(out.parent)


def _exchanged(one: Path, other: Path) -> bool:
    """Let two folders trade names in one step, so that neither name is ever without one; False where the system has no
    such call (Linux has, renameat2 with RENAME_EXCHANGE)."""
    call = getattr(ctypes.CDLL(None), "renameat2", None)
    here = -100  # AT_FDCWD
    return call is not None and call(here, os.fsencode(one), here, os.fsencode(other), 2) == 0
