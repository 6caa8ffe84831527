"""LoRA and its relatives: put an adapter on a base, take one from a folder after checking that it belongs there.

PEFT does the arithmetic, and its scaling (alpha / r, or alpha / sqrt(r) with rsLoRA) is the only one in the project.
Does not know: full fine-tuning (models.py), how a result is laid out on disk (publish.py).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from peft.utils.save_and_load import get_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from luthier.engine.sources import read_json
from luthier.spec.errors import BadSetting
from luthier.spec.job import TrainRequest

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
NOTE = "luthier.json"

# What of an adapter_config.json is obeyed. Nothing else is: some keys name modules to import.
OBEYED = (
    "r",
    "lora_alpha",
    "lora_dropout",
    "target_modules",
    "use_rslora",
    "use_dora",
    "rank_pattern",
    "alpha_pattern",
    "fan_in_fan_out",
)
# Keys that would change what the adapter computes if they were left out in silence.
REFUSED = (
    "modules_to_save",
    "layer_replication",
    "trainable_token_indices",
    "target_parameters",
    "layers_to_transform",
    "lora_bias",
    "alora_invocation_tokens",
    "arrow_config",
    "use_qalora",
    "megatron_config",
)


@dataclass(frozen=True)
class BaseOf:
    """Which base an adapter was trained on: a name to resolve, where it lay, and its content hash."""

    name: str
    folder: str
    hash: str


@dataclass(frozen=True)
class Start:
    """What the learning weights were before the first step: a hash of each (of its float32 values), by name.

    `tensors` keeps the values of adapter weights: PiSSA's result is the difference to them.
    """

    hashes: Mapping[str, str]
    tensors: Mapping[str, torch.Tensor] = field(default_factory=dict)


def add(model: PreTrainedModel, request: TrainRequest, alpha: float) -> PeftModel:
    """A fresh adapter on `model`, as the method asks. Raises BadSetting for targets that cannot be had."""
    targets = targets_of(model, request.target_modules)
    kinds = [part for name, part in model.named_modules() if _matches(name, targets)]
    if request.method == "pissa":
        narrowest = min(min(part.weight.shape) for part in kinds)
        if request.rank > narrowest:
            raise BadSetting(
                f"--rank: found {request.rank}; pissa wanted at most {narrowest}, the narrowest target's width.",
                param="rank",
            )
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=request.rank,
        lora_alpha=alpha,  # type: ignore[arg-type]
        lora_dropout=request.dropout,
        target_modules=targets,
        use_rslora=request.method == "rslora",
        use_dora=request.method == "dora",
        init_lora_weights="pissa_niter_16" if request.method == "pissa" else True,  # type: ignore[arg-type]
        fan_in_fan_out=any(isinstance(part, Conv1D) for part in kinds),
    )
    made = get_peft_model(model, config, autocast_adapter_dtype=False)
    assert isinstance(made, PeftModel)
    return made


def targets_of(model: PreTrainedModel, asked: list[str]) -> list[str]:
    """The module names that get an adapter: those asked for, or the last names of all linear layers but the head."""
    head = model.get_output_embeddings()
    embedding = model.get_input_embeddings()
    linear = {
        name: part for name, part in model.named_modules() if isinstance(part, nn.Linear | Conv1D) and part is not head
    }
    if not asked:
        return sorted({name.rsplit(".", 1)[-1] for name in linear})
    tied = bool(model.config.get_text_config().tie_word_embeddings)
    for target in asked:
        parts = [part for name, part in model.named_modules() if _matches(name, [target])]
        if any(part is embedding for part in parts) or (tied and any(part is head for part in parts)):
            raise BadSetting(
                f"--target-modules: found {target!r}, the {'tied ' if tied else ''}embeddings, which an adapter cannot "
                "change without losing the change on reload.",
                hint="Leave it out, or use --method full.",
                param="target_modules",
            )
        if not parts or not all(isinstance(part, nn.Linear | Conv1D) for part in parts):
            known = sorted({name.rsplit(".", 1)[-1] for name in linear})
            what = "no module of this model" if not parts else "not a linear layer"
            raise BadSetting(
                f"--target-modules: found {target!r}, {what}; wanted some of {', '.join(known)}.",
                param="target_modules",
            )
    return sorted(set(asked))


def _matches(name: str, targets: list[str]) -> bool:
    return any(name == target or name.endswith(f".{target}") for target in targets)


def fingerprint(values: Mapping[str, torch.Tensor]) -> Start:
    """Remember where learning starts: the learning weights by name, right after attach and before any step."""
    return Start(
        hashes={name: value_hash(value) for name, value in values.items()},
        tensors={name: value.detach().float().cpu().clone() for name, value in values.items() if "lora_" in name},
    )


def value_hash(tensor: torch.Tensor) -> str:
    """sha256 of the values as float32, so that a dtype that holds the same values hashes the same."""
    plain = tensor.detach().to("cpu", torch.float32).contiguous().reshape(-1)
    return hashlib.sha256(plain.numpy().data).hexdigest()


def state_of(model: nn.Module, weights: Mapping[str, torch.Tensor], start: Start) -> dict[str, torch.Tensor]:
    """The adapter as PEFT names it in a file, float32. `weights`: learnt values by the model's parameter names.

    A PiSSA adapter comes out as the plain LoRA of twice the rank that gives the same on the untouched base:
    B A - B0 A0 = [B, -B0] [A; A0].
    """
    state = _named_as_saved(model, weights)
    if _is_pissa(model):
        before = _named_as_saved(model, start.tensors)
        state = {
            key: torch.cat([now, before[key]]) if ".lora_A." in key else torch.cat([now, -before[key]], dim=1)
            for key, now in state.items()
        }
    return {key: value.contiguous() for key, value in state.items()}


def _named_as_saved(model: nn.Module, weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    plain = {name: tensor.detach().to("cpu", torch.float32) for name, tensor in weights.items()}
    return dict(get_peft_model_state_dict(model, state_dict=plain, save_embedding_layers=False))


def _is_pissa(model: nn.Module) -> bool:
    assert isinstance(model, PeftModel)
    return str(model.peft_config["default"].init_lora_weights).startswith("pissa")  # type: ignore[attr-defined]


def config_of(model: nn.Module, base_folder: Path) -> dict[str, Any]:
    """adapter_config.json for the state that `state_of` gives; every flag that scaling needs is in it."""
    assert isinstance(model, PeftModel)
    config = dict(model.peft_config["default"].to_dict())
    config["base_model_name_or_path"] = str(base_folder)
    config["inference_mode"] = True
    config["init_lora_weights"] = True
    config["target_modules"] = sorted(config["target_modules"])
    if _is_pissa(model):
        config["r"], config["lora_alpha"] = 2 * config["r"], 2 * config["lora_alpha"]
    return json.loads(json.dumps(config, default=_plain))  # type: ignore[no-any-return]


def _plain(value: Any) -> Any:
    return sorted(value) if isinstance(value, set) else str(value)


def base_of(folder: Path) -> BaseOf:
    """What luthier.json says about the adapter's base. Raises BadSetting when it does not say."""
    path = folder / NOTE
    base = read_json(path).get("base") if path.is_file() else None
    if not isinstance(base, dict) or not all(isinstance(base.get(key), str) for key in ("name", "folder", "hash")):
        raise BadSetting(
            f"The adapter {folder} does not say which base it was trained on ({NOTE} with base name and hash).",
            hint="On another base it would answer wrongly without a sign; use an adapter that Luthier made.",
            param="model",
        )
    return BaseOf(base["name"], base["folder"], base["hash"])


def load(model: PreTrainedModel, folder: Path) -> PeftModel:
    """`model` with the adapter of `folder` on it. Raises BadSetting unless every adapted module gets finite weights.

    Only the keys in OBEYED are taken from adapter_config.json. Does not check that `model` is the right base.
    """
    made, state = fitted(model, folder)
    set_peft_model_state_dict(made, state)
    return made


def fitted(model: PreTrainedModel, folder: Path) -> tuple[PeftModel, dict[str, torch.Tensor]]:
    """`model` (it may be on the meta device) with fresh adapter modules, and the weights of `folder` that go there.

    Raises BadSetting as `load` does.
    """
    state = _read_state(folder)
    config = _read_config(folder)
    try:
        made = get_peft_model(model, config, autocast_adapter_dtype=False)
        assert isinstance(made, PeftModel)
        expected = get_peft_model_state_dict(made, save_embedding_layers=False)
    except (ValueError, RuntimeError) as error:
        raise BadSetting(f"The adapter {folder} does not fit its base: {error}", param="model") from error
    _compare(set(state), set(expected), folder)
    for key, place in expected.items():
        if state[key].shape != place.shape:
            raise BadSetting(
                f"The adapter {folder} does not fit its base: {key} has the shape {list(state[key].shape)}, wanted "
                f"{list(place.shape)}.",
                param="model",
            )
    return made, state


def _read_state(folder: Path) -> dict[str, torch.Tensor]:
    path = folder / WEIGHTS
    if not path.is_file():
        raise BadSetting(f"The adapter {folder} has no {WEIGHTS}.", hint="Pickled adapters are refused.", param="model")
    try:
        state: dict[str, torch.Tensor] = load_file(path)
    except (SafetensorError, OSError) as error:
        raise BadSetting(f"{path} cannot be read: {error}.", param="model") from error
    if not state:
        raise BadSetting(f"{path} is empty: the adapter would change nothing.", param="model")
    for key, tensor in state.items():
        if not torch.isfinite(tensor).all():
            raise BadSetting(f"{path}: {key} holds values that are not finite.", param="model")
    return state


def _read_config(folder: Path) -> LoraConfig:
    path = folder / CONFIG
    values = read_json(path)
    if values.get("peft_type") != "LORA":
        raise BadSetting(f"{path}: found peft_type {values.get('peft_type')!r}, wanted LORA.", param="model")
    used = [key for key in REFUSED if values.get(key)]
    used += ["bias"] if values.get("bias", "none") != "none" else []
    if used:
        raise BadSetting(f"{path} uses {', '.join(used)}, which Luthier does not apply.", param="model")
    try:
        return LoraConfig(task_type="CAUSAL_LM", **{key: values[key] for key in OBEYED if key in values})
    except (TypeError, ValueError) as error:
        raise BadSetting(f"{path} is no usable LoRA configuration: {error}.", param="model") from error


def _compare(found: set[str], expected: set[str], folder: Path) -> None:
    missing, strange = sorted(expected - found), sorted(found - expected)
    if len(missing) == len(expected):
        raise BadSetting(
            f"The adapter {folder} matches no module of its base: it has {strange[0]}, wanted {missing[0]}.",
            param="model",
        )
    if missing or strange:
        first = f"lacks {missing[0]}" if missing else f"has {strange[0]}, which the base has no place for"
        raise BadSetting(
            f"The adapter {folder} {first} ({len(missing)} missing, {len(strange)} too many).", param="model"
        )
