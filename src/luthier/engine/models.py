"""Load a base model or a result, and choose which of its weights learn.

Does not know: where a base comes from (catalogue.py), how adapters are checked (adapters.py), attention, training.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from luthier.engine import adapters, catalogue, install, machine, products
from luthier.engine.convert import quiet
from luthier.engine.sources import Progress, refuse_unsafe
from luthier.spec.errors import BadSetting, NotFound
from luthier.spec.job import Settings, TrainRequest
from luthier.spec.run import RunFolder

Precision = Literal["bfloat16", "float32", "float16"]  # float16: float32, but for large products while it trains
Model = TypeVar("Model", bound=nn.Module)
DTYPES: dict[str, torch.dtype] = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float16": torch.float32}
FASTER = (
    1.2  # times; bfloat16 needs half the memory, and float32 is exact, so what is taken for them has to be worth it
)
SMALL = 32 << 20  # bytes of weights: the products of such models are too small for halves to pay (products.py)
# Tokens of a micro-batch: products are as fast as they get from about 1,000 rows on, so more would only take memory.
MOST_TOKENS, LEAST_TOKENS = 2048, 256
MOST_TOKENS_GPU = 16_384  # its products want more rows; but in float32 attention is under one mask (attention.py)


@dataclass(frozen=True)
class Loaded:
    """A model ready to answer: in eval mode, no weight asks for a gradient.

    `folder` holds the tokenizer, template and generation_config to use; `base_folder` the base's weights (the same
    folder unless `adapter`); `base_hash` is the content hash of `base_folder`.
    """

    model: PreTrainedModel | nn.Module
    folder: Path
    base_folder: Path
    base_hash: str
    adapter: bool
    name: str


def default_precision() -> Precision:
    """bfloat16 where this machine multiplies it natively (CUDA, AVX512-BF16 or AMX CPUs), else float32."""
    if torch.cuda.is_available():
        return "bfloat16" if torch.cuda.is_bf16_supported() else "float32"
    return processor_precision()


def processor_precision() -> Precision:
    """`default_precision` of what is computed on the CPU, whatever else is there."""
    able = torch.cpu.get_capabilities()
    return "bfloat16" if able.get("avx512_bf16") or able.get("amx_bf16") else "float32"


def quicker() -> Precision:
    """bfloat16 unless this machine multiplies float32 faster by a fifth. Processors that multiply bfloat16 natively
    need not do so: without AMX, an Intel one may take twice the time of float32. So both are tried."""
    usual = default_precision()
    if usual == "float32" or torch.cuda.is_available():
        return usual
    return usual if _gain() < FASTER else "float32"


def _gain() -> float:
    """How many times as fast as bfloat16 this machine multiplies float32."""
    return machine.product_rate(torch.float32) / machine.product_rate(torch.bfloat16)


def training_precision(folder: Path) -> tuple[Precision, str]:
    """(what to train the model in `folder` in, why, where that is not `default_precision`): float32 where it is the
    quicker one and its weights, twice as large, fill no more than a quarter of the memory that is free; float16 where
    float32 would be, and halves make its products quicker still."""
    usual, best = default_precision(), quicker()
    stored = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    room = machine.memory_room()
    if best != usual and room is not None and 2 * stored > room / 4:
        return usual, ""
    if best == "float32" and stored > SMALL and (gain := products.gain()) >= FASTER:
        return "float16", f"Products are of float16 numbers, {gain:.1f} times as fast as of float32 here"
    if best == usual:
        return usual, ""
    return best, f"This processor multiplies float32 {_gain():.1f} times as fast as bfloat16, so float32 it is"


def load_base(folder: Path, precision: Precision) -> PreTrainedModel:
    """The causal language model in `folder`, from safetensors only, no code of its folder run, on the CPU.

    Raises BadSetting when the folder is unsafe, is no causal language model, lacks weights that the architecture
    needs (transformers would make them up), or holds weights that are not finite.
    """
    quiet()
    refuse_unsafe(folder)
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=DTYPES[precision],
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            output_loading_info=True,
        )
    except (ValueError, KeyError, OSError, RuntimeError, SafetensorError) as error:
        raise BadSetting(f"{folder} cannot be loaded as a causal language model: {error}", param="model") from error
    model: PreTrainedModel = loaded[0]
    report = loaded[1]
    lacking = sorted(map(str, [*report["missing_keys"], *report["mismatched_keys"]]))
    if lacking:
        raise BadSetting(
            f"{folder} lacks {len(lacking)} weights of its architecture, {lacking[0]} first.",
            hint="The download may be incomplete: get the folder again.",
            param="model",
        )
    broken = [name for name, weight in model.named_parameters() if not torch.isfinite(weight).all()]
    if broken:
        raise BadSetting(f"{folder}: {broken[0]} holds values that are not finite ({len(broken)} such).", param="model")
    model.config.use_cache = False
    return model


def placed(model: Model) -> Model:
    """`model` on the GPU, where there is one."""
    return model.cuda() if torch.cuda.is_available() else model


def attach(model: PreTrainedModel, request: TrainRequest, settings: Settings) -> nn.Module:
    """`model` with the weights of `request.method` asking for gradients and no others. Changes `model` itself.

    The seed is set first, so the same seed gives the same adapter. Adapter weights take the model's own dtype:
    float32 masters are the trainer's. Raises BadSetting for target modules or layers that the model does not have.
    """
    torch.manual_seed(settings.seed)
    if request.uses_adapter:
        return adapters.add(model, request, settings.alpha)
    layers = _last_layers(model, request.method)
    model.requires_grad_(layers is None)
    for layer in layers or []:
        layer.requires_grad_(True)
    return model


def _last_layers(model: PreTrainedModel, method: str) -> list[nn.Module] | None:
    """The decoder layers that `freeze:N` leaves learning; None for `full`."""
    if method == "full":
        return None
    wanted = int(method.removeprefix("freeze:"))
    total = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    lists = [part for part in model.modules() if isinstance(part, nn.ModuleList) and len(part) == total]
    if not lists:
        raise BadSetting(
            f"--method {method}: the layers of {type(model).__name__} cannot be found.",
            hint="Use lora or full.",
            param="method",
        )
    if wanted > len(lists[0]):
        raise BadSetting(f"--method: found {method}; this model has {len(lists[0])} layers.", param="method")
    return list(lists[0])[-wanted:]


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that learn, by name, in the model's own (stable) order; tied ones once."""
    return {name: weight for name, weight in model.named_parameters() if weight.requires_grad}


def describe(model: nn.Module) -> str:
    """One sentence: how many weights learn, out of how many, and where."""
    learning = trainable(model)
    count = sum(weight.numel() for weight in learning.values())
    total = sum(weight.numel() for weight in model.parameters())
    where = sorted({_place(name) for name in learning})
    share = 100 * count / max(1, total)
    digits = max(0, 1 - math.floor(math.log10(share))) if share else 0
    return f"{count:,} of {total:,} weights learn ({share:.{min(digits, 4)}f} %): {', '.join(where)}."


def _place(name: str) -> str:
    parts = name.split(".")
    for mark in ("lora_A", "lora_B", "lora_magnitude_vector"):
        if mark in parts:
            return parts[parts.index(mark) - 1]
    return parts[-2] if len(parts) > 1 else name


def load_for_use(name_or_run: str, precision: Precision, progress: Progress | None = None) -> Loaded:
    """A run's result, an adapter folder, or whatever `catalogue.resolve` understands, ready to answer; on the GPU where
    there is one.

    Raises NotFound for a run without a result, BadSetting for an adapter that does not belong to its base or would
    change nothing, and whatever resolve and load_base raise.
    """
    path = Path(name_or_run).expanduser().absolute()
    if (path / "request.json").is_file():
        path = _result(path)
    if (path / "adapter_config.json").is_file():
        return _load_adapter(path, name_or_run, precision, progress)
    folder = path if install.is_model_folder(path) else catalogue.resolve(name_or_run, progress=progress)
    model = placed(load_base(folder, precision)).eval().requires_grad_(False)
    return Loaded(model, folder, folder, catalogue.content_hash(folder), False, name_or_run)


def _result(run: Path) -> Path:
    model = RunFolder(run).model
    if not model.is_dir():
        raise NotFound(
            f"The run {run} has no result yet: {model} is not there.",
            hint=f"Finish it with `luthier train --resume {run}`.",
        )
    return model


def _load_adapter(folder: Path, name: str, precision: Precision, progress: Progress | None) -> Loaded:
    refuse_unsafe(folder)
    wanted = adapters.base_of(folder)
    base = _find_base(wanted, folder, progress)
    model = placed(adapters.load(load_base(base, precision), folder))
    return Loaded(model.eval().requires_grad_(False), folder, base, wanted.hash, True, name)


def _find_base(wanted: adapters.BaseOf, adapter: Path, progress: Progress | None) -> Path:
    """The folder whose content is exactly what the adapter was trained on: where it lay, else by name."""
    found: list[str] = []
    where = Path(wanted.folder)
    if install.is_model_folder(where):
        if catalogue.content_hash(where) == wanted.hash:
            return where
        found.append(str(where))
    try:
        by_name = catalogue.resolve(wanted.name, progress=progress)
    except (NotFound, BadSetting):
        by_name = None
    if by_name is not None and by_name != where:
        if catalogue.content_hash(by_name) == wanted.hash:
            return by_name
        found.append(str(by_name))
    if found:
        raise BadSetting(
            f"The adapter {adapter} was trained on another base: {' and '.join(found)} differs in config, weights or "
            f"tokenizer from the {wanted.name} it needs (content {wanted.hash[:12]}).",
            hint="Bring the original base back, or train again on this one.",
            param="model",
        )
    raise NotFound(
        f"The base {wanted.name} of the adapter {adapter} is not here ({wanted.folder} is gone).",
        hint="Put the base back at that place or install it under its name.",
        param="model",
    )


def activation_bytes(model: Any) -> int:
    """About what training keeps of one token until it goes backward. An upper estimate: twice what the fused layers
    keep (SmolLM2-135M: 780 KB reckoned, 670 measured with all that lives for a moment)."""
    config = model.config.get_text_config()
    heads = config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    keys = getattr(config, "num_key_value_heads", None) or heads
    inner = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    inner = max(inner) if isinstance(inner, (list, tuple)) else inner
    width = 2 * config.hidden_size + (3 * heads + 3 * keys) * size + 2 * inner
    element = next(model.parameters()).element_size()
    return int(2 * element * width * config.num_hidden_layers)


def fitting_tokens(model: Any, whole: bool) -> int:
    """Tokens of a micro-batch that half of the free memory holds, beside the optimizer's state where the `whole` model
    learns; within LEAST_TOKENS and what makes the best use of the processor."""
    weight = next(model.parameters())
    most = MOST_TOKENS_GPU if weight.is_cuda and weight.dtype != torch.float32 else MOST_TOKENS
    room = machine.memory_room()
    if room is None:
        return most
    if whole:
        room -= 16 * sum(weight.numel() for weight in model.parameters())
    return max(LEAST_TOKENS, min(most, room // 2 // activation_bytes(model) // 256 * 256))


def still(model: Any) -> list[str]:
    """Attention dropout would need a random mask inside every block; it is turned off, and said."""
    found = [0.0]
    for module in model.modules():
        for name in ("attention_dropout", "attn_dropout"):
            value = getattr(module, name, None)
            if isinstance(value, float):
                found.append(value)
                setattr(module, name, 0.0)
            elif isinstance(value, torch.nn.Dropout):
                found.append(value.p)
                value.p = 0.0
    return [f"The base's attention dropout of {max(found)} is turned off while tuning."] if max(found) > 0 else []
