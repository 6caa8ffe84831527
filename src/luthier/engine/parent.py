"""A tuned model to go on from: where it lies, whether it belongs to this base, and its weights as training's start.

An adapter goes on as the adapter it is: its kind, rank, alpha and modules are taken from it, and its float32 weights
become the masters, so the first loss is the parent's own. A full model takes the base's place, and only as the start:
the result still names the base. An adapter on a full parent is refused, as it would fit that parent and no base.
Does not know: data, the loop.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.utils.save_and_load import get_peft_model_state_dict
from torch import Tensor, nn
from transformers import PreTrainedModel

from luthier.engine import adapters, catalogue, install
from luthier.engine.sources import read_json, refuse_unsafe
from luthier.spec.errors import BadSetting, NotFound
from luthier.spec.job import TrainRequest
from luthier.spec.run import RunFolder

ALONE = ("rank", "alpha", "target_modules")  # what an adapter's parent decides


@dataclass(frozen=True)
class Parent:
    """A tuned model of the right base. `hash` is of what it computes; `template` a file, or None."""

    folder: Path
    hash: str
    adapter: bool
    template: str | None

    def fit(self, request: TrainRequest) -> TrainRequest:
        """`request` with what the parent decides. Raises BadSetting for options that say otherwise."""
        if not self.adapter:
            if request.uses_adapter:
                raise BadSetting(
                    f"--continue-from: {self.folder} is a full model, and an adapter on it would fit it alone, not "
                    f"{request.model}.",
                    hint=f"Choose --method full, or train on it as a base: --model {self.folder}.",
                    param="continue_from",
                )
            return request
        if not request.uses_adapter:
            raise BadSetting(
                f"--method: found {request.method}; {self.folder} is an adapter, which goes on as one.",
                hint="Leave --method out.",
                param="method",
            )
        config = read_json(self.folder / adapters.CONFIG)
        kind = "dora" if config.get("use_dora") else "rslora" if config.get("use_rslora") else "lora"
        found = {
            "rank": config.get("r"),
            "alpha": config.get("lora_alpha"),
            "target_modules": sorted(config.get("target_modules") or []),
        }
        if request.method not in ("lora", kind):
            raise _other("method", request.method, kind)
        for name in set(ALONE) & request.model_fields_set:
            asked = getattr(request, name)
            asked = sorted(asked) if name == "target_modules" else asked
            if asked not in (None, [], found[name]) and asked != TrainRequest.model_fields[name].default:
                raise _other(name, asked, found[name])
        known = "dropout" in request.model_fields_set or request.prefers  # a pair is judged without, see spec/job.py
        dropout = request.dropout if known else config.get("lora_dropout", 0.0)
        return request.model_copy(update={**found, "method": kind, "dropout": dropout})

    def attach(self, base: PreTrainedModel, request: TrainRequest) -> tuple[nn.Module, dict[str, Tensor]]:
        """(`base` with the parent's adapter learning, its float32 weights as they are named in its file)."""
        refuse_unsafe(self.folder)
        model, state = adapters.fitted(base, self.folder)
        for module in model.modules():
            drops = getattr(module, "lora_dropout", None)
            if isinstance(drops, nn.ModuleDict):
                drops["default"] = nn.Dropout(request.dropout) if request.dropout else nn.Identity()
        model.peft_config["default"].lora_dropout = request.dropout  # type: ignore[attr-defined]
        return model, state


def find(request: TrainRequest, base_hash: str) -> Parent | None:
    """The model that `request.continue_from` names, or None. Raises NotFound, or BadSetting when it is no tuned model
    or its base is another one."""
    if request.continue_from is None:
        return None
    folder = _folder(request.continue_from)
    try:
        base = adapters.base_of(folder)
        adapter = (folder / adapters.CONFIG).is_file()
        if not adapter and not install.is_model_folder(folder):
            raise BadSetting(f"{folder} is neither an adapter nor a full model.")
        own = _adapter_hash(folder) if adapter else catalogue.content_hash(folder)
    except BadSetting as error:
        error.param = "continue_from"
        raise
    if base.hash != base_hash:
        raise BadSetting(
            f"--continue-from: {folder} was tuned from {base.name} (content {base.hash[:12]}), which is not "
            f"{request.model} (content {base_hash[:12]}).",
            hint=f"Give its own base: --model {base.name}.",
            param="continue_from",
        )
    template = folder / "chat_template.jinja"
    return Parent(folder, own, adapter, str(template) if template.is_file() else None)


@torch.no_grad()
def start_from(values: Mapping[str, Tensor], model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Set learning weights, by the model's parameter names, to an adapter's file. `values`: the float32 masters."""
    assert isinstance(model, PeftModel)
    names = list(values)
    marks = {name: torch.tensor(float(number)) for number, name in enumerate(names)}
    saved: dict[str, Any] = get_peft_model_state_dict(model, state_dict=marks, save_embedding_layers=False)
    for key, mark in saved.items():
        values[names[int(mark)]].copy_(state[key])


def _folder(given: str) -> Path:
    path = Path(given).expanduser().absolute()
    if (path / "request.json").is_file():
        path = RunFolder(path).model
    if not path.is_dir():
        raise NotFound(
            f"--continue-from: there is no folder {path}.",
            param="continue_from",
            hint="Give a finished run, an adapter or a full model.",
        )
    return path


def _adapter_hash(folder: Path) -> str:
    total = hashlib.sha256()
    for name in (adapters.CONFIG, adapters.WEIGHTS):
        if not (folder / name).is_file():
            raise BadSetting(f"The adapter {folder} has no {name}.")
        total.update(f"\0{name}\0{install.sha256(folder / name)}".encode())
    return total.hexdigest()


def _other(name: str, asked: object, found: object) -> BadSetting:
    return BadSetting(
        f"--{name.replace('_', '-')}: found {asked}; the adapter to continue from has {found}.",
        hint="Leave it out.",
        param=name,
    )
