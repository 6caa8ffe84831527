"""Models, adapters and schedulers for the replica's tests, in this process, float32."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import PreTrainedModel

from luthier.engine import catalogue, models
from luthier.engine.generate import context_of
from luthier.engine.models import Precision
from luthier.serve import compute
from luthier.serve.lora import Adapter, Shelf
from luthier.serve.scheduler import Scheduler
from luthier.spec.serving import Ask, Part, Token

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def load(folder: Path, precision: Precision = "float32") -> PreTrainedModel:
    return models.load_base(folder, precision).eval().requires_grad_(False)


def make_adapter(base: Path, folder: Path, seed: int, **config: Any) -> Path:
    """A random adapter on `base`, as PEFT writes it, with the note that says on which base."""
    torch.manual_seed(seed)
    config = {"r": 4, "lora_alpha": 8, "target_modules": LINEAR} | config
    made = get_peft_model(load(base), LoraConfig(task_type="CAUSAL_LM", **config))
    for name, weight in made.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.3)
        if "magnitude" in name:
            weight.data.mul_(1.2)
    made.save_pretrained(folder, save_embedding_layers=False)
    note = {"base": {"name": "tiny", "folder": str(base), "hash": catalogue.content_hash(base)}}
    (folder / "luthier.json").write_text(json.dumps(note))
    return folder


class Bench:
    """A scheduler over the model in `base`, and what it said."""

    def __init__(
        self,
        base: Path,
        *,
        kv_tokens: int = 4096,
        prefix_bytes: int = 2**24,
        rows: int = 16,
        adapters: int = 8,
        precision: Precision = "float32",
    ) -> None:
        self.model = load(base, precision)
        self.compute = compute.choose(self.model, kv_tokens, prefix_bytes, 0)
        self.parts: list[Part] = []
        self.scheduler = Scheduler(self.compute, context_of(self.model), kv_tokens, rows, self.parts.append)
        self.shelf = Shelf(
            self.model,
            self.compute.weight_of,
            lambda: catalogue.content_hash(base),
            self.compute.modules,
            adapters,
        )

    def adapter(self, folder: Path | None) -> Adapter | None:
        return None if folder is None else self.shelf.get(folder, None)

    def add(self, ask: Ask, matcher: Any = None) -> None:
        self.scheduler.add(ask, self.adapter(Path(ask.adapter) if ask.adapter else None), matcher)

    def run(self, asks: Iterable[Ask] = ()) -> dict[str, Answer]:
        """Everything answered; joined parts by id."""
        for ask in asks:
            self.add(ask)
        while self.scheduler.busy:
            self.scheduler.step()
        return self.answers()

    def answers(self) -> dict[str, Answer]:
        given: dict[str, Answer] = {}
        for part in self.parts:
            given.setdefault(part.id, Answer()).add(part)
        return given


class Answer:
    def __init__(self) -> None:
        self.tokens: list[Token] = []
        self.prompt: list[Token] = []
        self.last: Part | None = None

    def add(self, part: Part) -> None:
        assert self.last is None or self.last.finish is None, "a part after the last"
        self.tokens += part.tokens
        self.prompt += part.prompt
        self.last = part

    @property
    def ids(self) -> list[int]:
        return [token.id for token in self.tokens]

    @property
    def logprobs(self) -> list[float]:
        return [token.logprob for token in self.tokens if token.logprob is not None]

    @property
    def finish(self) -> str | None:
        return self.last.finish if self.last else None


def ask(name: str, prompt: list[int], **more: Any) -> Ask:
    return Ask.model_validate({"id": name, "prompt": prompt, "max_tokens": 12, "temperature": 0, "logprobs": 2} | more)
