"""Turn what others publish (GGUF, slow tokenizers) into the one form the engine reads: safetensors + tokenizer.json.

A conversion proves itself: the written folder is loaded again and must give the same tokens and the same finite
logits. Does not know: where the files came from or where they go.
"""

from __future__ import annotations

import contextlib
import gc
import io
import json
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from tokenizers import Regex, Tokenizer, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from luthier.engine.sources import SourceFailed
from luthier.spec.errors import BadSetting

PROBE = "The 12 quick  brown foxes: 3.5 + 40 = 43.5\n\nNaïve 你好 🎻\tend"

# How a GGUF of the byte-level kind cuts text before BPE, by its `tokenizer.ggml.pre`. transformers ignores that key
# and applies GPT-2's rule to them all. The rules are llama.cpp's (src/llama-vocab.cpp) in the `tokenizers` library.
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
_TAIL = r"|\s+(?!\S)|\s+"
CUTS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("default", "gpt-2", "gpt2"), (_GPT2,)),
    **dict.fromkeys(("smollm", "starcoder", "command-r", "refact"), (r"\p{N}", _GPT2)),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3"), (_WORDS % "{1,3}" + _TAIL,)),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen"), (_WORDS % "" + _TAIL,)),
}


def quiet() -> None:
    """No progress bars or advice from transformers: progress is told by whoever called us."""
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    # PEFT reads an attribute that transformers has renamed; nothing that a user could act on.
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)


def convert_gguf(gguf: Path, out: Path) -> None:
    """Write the model in `gguf` to the folder `out`: config, safetensors, generation_config, tokenizer, template.

    Quantised weights are saved as bfloat16 (what their originals were made in), float ones as float32. Raises
    BadSetting for a file that transformers cannot read as a causal language model, SourceFailed when the written
    folder does not give back what was read.
    """
    quiet()
    scalars = _scalars(gguf)
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # a progress bar that no setting of transformers silences
            tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
            model: Any = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    except (ValueError, KeyError, NotImplementedError) as error:
        raise BadSetting(
            f"{gguf} cannot be converted: {error}.", hint="Give the model as safetensors.", param="model"
        ) from error
    _cut_as_told(tokenizer.backend_tokenizer, scalars.get("tokenizer.ggml.pre"), gguf)
    model.hf_quantizer = None
    model.is_quantized = False
    for name in ("quantization_config", "_model_name_or_path"):
        if hasattr(model.config, name):
            delattr(model.config, name)
    if scalars.get("general.file_type") not in (0, 1):  # 0: all F32, 1: F16
        for parameter in model.parameters():  # not model.to(): that would round RoPE's frequencies as well
            parameter.data = parameter.data.to(torch.bfloat16)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.bos_token_id = tokenizer.bos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    tokenizer.save_pretrained(out)
    try:
        model.save_pretrained(out)
    except SafetensorError as error:  # also how a full disk shows here
        raise SourceFailed(f"conversion: the weights cannot be written ({error}).") from error
    strip_local_notes(out / "tokenizer_config.json")
    ids = tokenizer(PROBE)["input_ids"]
    for parameter in model.parameters():
        parameter.data = parameter.data.float()
    expected = _logits(model, ids)
    del model
    gc.collect()
    _prove(out, ids, expected)


def _scalars(gguf: Path) -> dict[str, Any]:
    from gguf import GGUFReader

    try:
        reader = GGUFReader(gguf)
    except (ValueError, OSError) as error:
        raise BadSetting(f"{gguf} is not a readable GGUF file: {error}.", param="model") from error
    wanted = ("general.file_type", "tokenizer.ggml.pre")
    return {key: field.contents() for key in wanted if (field := reader.get_field(key)) is not None}


def _cut_as_told(tokenizer: Tokenizer, pre: str | None, gguf: Path) -> None:
    """Give a byte-level tokenizer the pre-tokenizer that its file names; others (SentencePiece kind) need none."""
    if "ByteLevel" not in str(tokenizer.pre_tokenizer):
        return
    if pre is not None and pre not in CUTS:
        raise BadSetting(
            f"{gguf}: its tokenizer cuts text by the rule {pre!r}, which Luthier does not know and would get wrong.",
            hint="Give the original model with its tokenizer.json.",
            param="model",
        )
    steps = [pre_tokenizers.Split(Regex(rule), "isolated") for rule in CUTS[pre or "default"]]
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*steps, last])


def convert_tokenizer(folder: Path, out: Path) -> None:
    """Write tokenizer.json and its neighbours for a model folder that has only the slow files. Raises BadSetting."""
    quiet()
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        backend = tokenizer.backend_tokenizer
    except (ValueError, OSError, ImportError, AttributeError) as error:
        raise BadSetting(
            f"{folder} has no tokenizer.json, and its tokenizer cannot be converted: {error}.", param="model"
        ) from error
    del backend
    tokenizer.save_pretrained(out)
    strip_local_notes(out / "tokenizer_config.json")


def strip_local_notes(tokenizer_config: Path) -> None:
    """Drop the keys that transformers adds about how this process loaded the tokenizer."""
    config = json.loads(tokenizer_config.read_text("utf-8"))
    for key in ("is_local", "local_files_only", "name_or_path"):
        config.pop(key, None)
    tokenizer_config.write_text(json.dumps(config, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


@torch.inference_mode()
def _logits(model: Any, ids: list[int]) -> torch.Tensor:
    logits: torch.Tensor = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
    return logits


def _prove(folder: Path, ids: list[int], expected: torch.Tensor) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    again = tokenizer(PROBE)["input_ids"]
    if again != ids:
        raise SourceFailed(f"conversion: the saved tokenizer gives {again} where the source gave {ids}.")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, use_safetensors=True)
    found = _logits(model, ids)
    if not torch.isfinite(found).all():
        raise SourceFailed("conversion: the saved model gives logits that are not finite.")
    if not torch.allclose(found, expected, atol=1e-4, rtol=0):
        worst = (found - expected).abs().max().item()
        raise SourceFailed(f"conversion: the saved model's logits differ from the source's by {worst:.2g}.")
