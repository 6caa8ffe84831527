"""Tokenizers and models small enough for a test: random weights, a real tokenizer, one folder that transformers loads.

Deterministic for the same arguments. Does not know: any real model (conftest's `smollm2` is one).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<s>", "</s>")
CORPUS = (
    "the quick brown fox jumps over the lazy dog and then the dog answers the fox",
    "system user assistant tool developer you are a helpful assistant",
    "What is the capital of France? The capital of France is Paris.",
    "Classify the ticket: billing, shipping, refund, other. The answer is billing.",
    "one two three four five six seven eight nine ten 1 2 3 4 5 6 7 8 9 10",
    "def add(a, b):\n    return a + b\n",
    "你好，世界。今天天气很好。",
)


def make_tokenizer(
    folder: Path,
    *,
    bos: bool = False,
    template: str | None = CHATML,
    extra_special: Sequence[str] = (),
    corpus: Sequence[str] = CORPUS,
    entries: int = 400,
) -> Path:
    """Write tokenizer.json, tokenizer_config.json and chat_template.jinja (unless `template` is None) into `folder`.

    Byte-level BPE of about `entries` learnt from `corpus`, every byte included, so any text survives encode and decode.
    `bos` makes the post-processor put <s> first, as Llama's and Gemma's tokenizers do. eos is <|im_end|>, pad is
    <|endoftext|>.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=entries,
        special_tokens=[*SPECIALS, *extra_special],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*corpus] * 4, trainer)
    if bos:
        first = tokenizer.token_to_id("<s>")
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", first)]
        )
    tokenizer.save(str(folder / "tokenizer.json"))
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "clean_up_tokenization_spaces": False,
        "model_max_length": 512,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2))
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    return folder


def make_model(
    folder: Path,
    *,
    family: str = "llama",
    seed: int = 0,
    layers: int = 2,
    hidden: int = 32,
    heads: int = 4,
    kv_heads: int = 2,
    tied: bool = True,
    max_positions: int = 512,
    sliding_window: int | None = None,
    bos: bool = False,
    template: str | None = CHATML,
    extra_special: Sequence[str] = (),
    corpus: Sequence[str] = CORPUS,
    entries: int = 400,
    **config: Any,
) -> Path:
    """Write a loadable model folder: config, float32 random weights, generation_config and the tokenizer above.

    `family` is a transformers model type (llama, qwen2, qwen3, mistral, gemma3, ...; "gemma3" means its text model).
    Other keywords go into the model's config as they are.
    """
    import torch
    from tokenizers import Tokenizer
    from transformers import AutoConfig, AutoModelForCausalLM

    make_tokenizer(folder, bos=bos, template=template, extra_special=extra_special, corpus=corpus, entries=entries)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    window = {} if sliding_window is None else {"sliding_window": sliding_window}
    if sliding_window is not None and family.startswith("qwen"):
        window |= {"use_sliding_window": True, "max_window_layers": 0}
    settings: dict[str, Any] = {
        "vocab_size": tokenizer.get_vocab_size(),
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": hidden // heads,
        "max_position_embeddings": max_positions,
        "tie_word_embeddings": tied,
        "bos_token_id": tokenizer.token_to_id("<s>"),
        "eos_token_id": tokenizer.token_to_id("<|im_end|>"),
        "pad_token_id": tokenizer.token_to_id("<|endoftext|>"),
        **window,
        **config,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = AutoConfig.for_model("gemma3_text" if family == "gemma3" else family, **settings)
        model = AutoModelForCausalLM.from_config(made, dtype=torch.float32)
        for parameter in model.parameters():  # the default 0.02 leaves every logit near 0: make answers distinct
            if parameter.dim() > 1:
                parameter.data.mul_(5)
    model.save_pretrained(folder)
    return folder
