"""One optimizer step on one GPU: the engine beside a flat loop tuned by hand, and TRL where it is installed.

    python -m benchmarks.gpu [--shape 1b] [--case "S1 S2 C1 P1"] [--rounds 5] [--out FILE]

Weights are random in the shape of a known model: what a step takes does not depend on their values, so no download is
needed. Rows are those of the cases of benchmarks/training, of random ids; P1 is a step of DPO. The gate comes
first: the loss of a step within 1e-3 of the flat loop's in float32, and the adapter's gradient at a cosine of 0.99 or
more (bfloat16 against float32); who fails it has no times. Rounds are interleaved; a figure is the median of them.
Does not know: cold starts, data, time to a target: those are the CPU benchmark's.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

from benchmarks.training.workloads import CASES, MAKERS
from luthier.engine import attention, layers, machine, planner, preference, step, stream
from luthier.engine.forest import Row
from luthier.engine.optimizer import Masters
from luthier.engine.preference import Judge, Outcome

SHAPES: dict[str, dict[str, Any]] = {
    "135m": {
        "vocab_size": 49_152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
        "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64, "tie_word_embeddings": True,
    },
    "1b": {
        "vocab_size": 128_256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "tie_word_embeddings": True,
    },
    "8b": {
        "vocab_size": 128_256, "hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": False,
    },
}  # fmt: skip
DEVICE = "cuda"
STEPS = 1000  # that TRL believes to be asked for
ROWS = {"S1": 16, "S2": 16, "S3": 64, "C1": 8}  # of a step
PAIRS, PROMPT, ANSWER, BETA = (
    16,
    512,
    (128, 256),
    0.1,
)  # of P1: pairs, tokens of a prompt and (least, most) of an answer
LOSS, COSINE = 1e-3, 0.99
Step = Callable[[], float]  # forward, backward and update; the loss


def rows_of(case: str) -> list[Row]:
    """The case's rows with random ids; what rows share they share here too."""

    def pick(kind: str, seed: str, tokens: int) -> list[int]:
        chance = np.random.default_rng(list(f"{kind} {seed}".encode()))
        return [int(token) for token in chance.integers(10, 40_000, tokens)]

    made = MAKERS[CASES[case].shape](pick, 0, ROWS[case])
    return [(np.array(ids, np.int32), np.array(mask, np.float32)) for ids, mask in made]


def pairs() -> list[Row]:
    """P1: prompts that share nothing, the preferred answer of each before the other one."""
    chance, made = np.random.default_rng(1), []
    for _ in range(PAIRS):
        prompt = chance.integers(10, 40_000, PROMPT)
        for _ in range(2):
            answer = chance.integers(10, 40_000, chance.integers(*ANSWER))
            learnt = np.r_[np.zeros(PROMPT), np.ones(len(answer))].astype(np.float32)
            made.append((np.r_[prompt, answer].astype(np.int32), learnt))
    return made


def make(shape: str) -> Any:
    """The base with an adapter (LoRA r16, alpha 32, every linear layer but the head) whose B is not zero."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model("llama", max_position_embeddings=8192, **SHAPES[shape])
    with torch.device(DEVICE):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")
    model.config.use_cache = False
    lora = LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules="all-linear")
    made: Any = get_peft_model(model, lora, autocast_adapter_dtype=False)
    for name, weight in made.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.01)
    return made.train()


def learning(model: Any) -> dict[str, Any]:
    return {name: weight for name, weight in model.named_parameters() if weight.requires_grad}


def ours(model: Any, rows: list[Row], micro: int) -> Step:
    """As the engine's loop takes a step; `micro` is tokens."""
    masters = Masters(learning(model), 0.0)
    normaliser = float(sum(weights.sum() for _, weights in rows))

    def take() -> float:
        loss = 0.0
        for _, work in planner.works(rows, micro, trunks=step.branches(model)):
            loss += stream.forward_backward(model, work, normaliser, collect=masters.collect)
        masters.step(0.0, 1.0)
        return loss

    return take


def flat(model: Any, rows: list[Row], micro: int) -> Step:
    """Rows sorted by length and padded to the right, causal SDPA without a mask, head at learnt positions only; `micro`
    is rows."""
    masters = Masters(learning(model), 0.0)
    ordered = sorted(rows, key=lambda row: len(row[0]))
    learnt = sum(float(weights[1:].sum()) for _, weights in rows)
    base = model.get_base_model()

    def take() -> float:
        total = []
        for at in range(0, len(ordered), micro):
            part = ordered[at : at + micro]
            longest = max(len(ids) for ids, _ in part)
            ids = torch.tensor([[*row.tolist(), *[0] * (longest - len(row))] for row, _ in part], device=DEVICE)
            on = torch.tensor([[*w.tolist(), *[0.0] * (longest - len(w))] for _, w in part], device=DEVICE)[:, 1:] > 0
            hidden = base.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
            picked, targets = hidden[on], ids[:, 1:][on]
            leaf = picked.detach().requires_grad_()
            for start in range(0, len(targets), 2048):
                cut = slice(start, start + 2048)
                logits = base.lm_head(leaf[cut]).float()
                loss = torch.nn.functional.cross_entropy(logits, targets[cut], reduction="sum") / learnt
                loss.backward()
                total.append(loss.detach())
            picked.backward(leaf.grad)
            masters.collect()
        masters.step(0.0, 1.0)
        return float(sum(total))

    return take


def trl(model: Any, rows: list[Row], micro: int) -> Step:
    """SFTTrainer's own step: bfloat16, no checkpointing, SDPA, rows sorted by length; `micro` is rows."""
    from datasets import Dataset  # type: ignore[import-not-found]
    from trl import SFTConfig, SFTTrainer  # type: ignore[import-not-found]

    ordered = sorted(rows, key=lambda row: len(row[0]))
    labels = [np.where(weights > 0, ids, -100).tolist() for ids, weights in ordered]
    data = Dataset.from_dict({"input_ids": [ids.tolist() for ids, _ in ordered], "labels": labels})
    config = SFTConfig(**_asked(micro, len(rows)))
    return _trainers(SFTTrainer(model=model, args=config, train_dataset=data, processing_class=_no_tokenizer()), model)


def _no_tokenizer() -> Any:
    """One that knows how to pad."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"a": 0}, "a")), pad_token="a", eos_token="a")


def _asked(micro: int, rows: int) -> dict[str, Any]:
    """What both of TRL's trainers are asked; `rows` of a step."""
    return {
        "output_dir": tempfile.mkdtemp(), "max_steps": STEPS, "per_device_train_batch_size": micro, "bf16": False,
        "gradient_accumulation_steps": rows // micro, "learning_rate": 0.0, "lr_scheduler_type": "constant",
        "weight_decay": 0.0, "max_grad_norm": 1.0, "logging_steps": 1, "save_strategy": "no", "report_to": "none",
        "disable_tqdm": True, "gradient_checkpointing": False, "max_length": None,
        "train_sampling_strategy": "sequential",
    }  # fmt: skip


def _trainers(trainer: Any, model: Any) -> Step:
    trainer.create_optimizer_and_scheduler(STEPS)
    trainer.model_wrapped = trainer.accelerator.prepare(trainer.model)
    batches = list(trainer.get_train_dataloader())
    items = trainer._get_num_items_in_batch(batches, torch.device(DEVICE))
    trainer.current_gradient_accumulation_steps = len(batches)

    def take() -> float:
        total = [trainer.training_step(trainer.model_wrapped, dict(batch), items) for batch in batches]
        torch.nn.utils.clip_grad_norm_(list(learning(model).values()), 1.0)
        trainer.optimizer.step()
        trainer.optimizer.zero_grad()
        return float(sum(total))

    return take


def our_pairs(model: Any, rows: list[Row], micro: int) -> Step:
    """As the engine's loop takes a step of DPO; what the start finds of the answers is known."""
    masters = Masters(learning(model), 0.0)
    start = stream.row_log_probs(model, rows, micro, each=2)

    def take() -> float:
        outcome = Outcome()
        for _, work in planner.works(rows, micro, trunks=step.branches(model), each=2):
            preference.forward_backward(model, work, start, Judge(BETA), PAIRS, outcome, collect=masters.collect)
        masters.step(0.0, 1.0)
        return outcome.loss / PAIRS

    return take


def flat_pairs(model: Any, rows: list[Row], micro: int) -> Step:
    """`flat` for pairs, `micro` of them at once."""
    masters = Masters(learning(model), 0.0)
    base = model.get_base_model()

    def log_probs(part: list[Row]) -> torch.Tensor:
        longest = max(len(ids) for ids, _ in part)
        ids = torch.tensor([[*row.tolist(), *[0] * (longest - len(row))] for row, _ in part], device=DEVICE)
        on = torch.tensor([[*w.tolist(), *[0.0] * (longest - len(w))] for _, w in part], device=DEVICE)[:, 1:] > 0
        hidden = base.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
        losses = torch.nn.functional.cross_entropy(base.lm_head(hidden[on]).float(), ids[:, 1:][on], reduction="none")
        return -torch.zeros(on.shape, device=DEVICE).masked_scatter(on, losses).sum(dim=1)

    parts = [rows[at : at + 2 * micro] for at in range(0, len(rows), 2 * micro)]
    with torch.no_grad():
        start = [log_probs(part) for part in parts]

    def take() -> float:
        total = []
        for part, reference in zip(parts, start, strict=True):
            gained = log_probs(part) - reference
            loss = -torch.nn.functional.logsigmoid(BETA * (gained[0::2] - gained[1::2])).sum() / PAIRS
            loss.backward()
            total.append(loss.detach())
            masters.collect()
        masters.step(0.0, 1.0)
        return float(sum(total))

    return take


def trl_pairs(model: Any, rows: list[Row], micro: int) -> Step:
    """DPOTrainer's own step, log-probabilities of the start computed beforehand; `micro` is pairs."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer
    from trl.trainer import dpo_trainer  # type: ignore[import-not-found]

    class Tokenized(DPOTrainer):  # type: ignore[misc]
        def _prepare_dataset(self, dataset: Any, *rest: Any) -> Any:
            return dataset

    data = Dataset.from_dict(
        {
            "prompt_ids": [ids[:PROMPT].tolist() for ids, _ in rows[0::2]],
            "chosen_ids": [ids[PROMPT:].tolist() for ids, _ in rows[0::2]],
            "rejected_ids": [ids[PROMPT:].tolist() for ids, _ in rows[1::2]],
        }
    )
    config = DPOConfig(beta=BETA, precompute_ref_log_probs=True, **_asked(micro, PAIRS))
    alike = partial(model.add_adapter, autocast_adapter_dtype=False)  # the start in the precision of what is tuned
    hashed = mock.patch.object(dpo_trainer, "hash_module", return_value="start")  # of all weights, for a cache: no step
    with hashed, mock.patch.object(model, "add_adapter", alike):
        trainer = Tokenized(model=model, args=config, train_dataset=data, processing_class=_no_tokenizer())
    model.delete_adapter("ref")  # the start, which has been asked all it will be
    return _trainers(trainer, model)


Way = Callable[[Any, list[Row], int], Step]
SYSTEMS: dict[str, Way] = {"luthier": ours, "flat": flat, "trl": trl}
SYSTEMS_OF_PAIRS: dict[str, Way] = {"luthier": our_pairs, "flat": flat_pairs, "trl": trl_pairs}
MICRO = {"luthier": (4096, 8192, 16_384, 32_768), "flat": (4, 8, 16), "trl": (4, 8, 16)}


def prepared(system: str, shape: str) -> Any:
    """A model for a system; all start from the same numbers."""
    model = make(shape)
    if system == "luthier":
        attention.install(model.get_base_model())
        assert (reason := layers.fuse(model.get_base_model())) is None, reason
    return model


def seconds(take: Step) -> float:
    torch.cuda.synchronize()
    begun = time.perf_counter()
    take()
    torch.cuda.synchronize()
    return time.perf_counter() - begun


def gradients(take: Step) -> tuple[float, torch.Tensor]:
    """(loss, all gradients) of one step, seen when the optimizer would clip them."""
    seen: list[torch.Tensor] = []
    clip = torch.nn.utils.clip_grad_norm_

    def look(values: Any, *rest: Any) -> Any:
        seen.append(torch.cat([value.grad.detach().double().flatten().cpu() for value in values]))
        return clip(values, *rest)

    with mock.patch.object(torch.nn.utils, "clip_grad_norm_", look):
        return take(), seen[0]


def reference(shape: str, rows: list[Row], way: Way) -> tuple[float, torch.Tensor]:
    model = make(shape).float()
    return gradients(way(model, rows, 1))


def compare(shape: str, case: str, names: list[str], rounds: int) -> dict[str, Any]:
    rows, systems = (pairs(), SYSTEMS_OF_PAIRS) if case == "P1" else (rows_of(case), SYSTEMS)
    tokens = sum(len(ids) for ids, _ in rows)
    found: dict[str, Any] = {"shape": shape, "case": case, "tokens": tokens, "systems": {}}
    truth = reference(shape, rows, systems["flat"])
    able: dict[str, Any] = {}
    for name in names:
        model = prepared(name, shape)
        tried: dict[int, float] = {}
        for micro in MICRO[name]:
            if name != "luthier" and micro > len(rows):
                continue
            try:
                take = systems[name](model, rows, micro)
                take()
                tried[micro] = min(seconds(take) for _ in range(2))
            except torch.OutOfMemoryError:
                torch.cuda.empty_cache()
        best = min(tried, key=lambda micro: tried[micro])
        take = systems[name](model, rows, best)
        told: dict[str, Any] = {"micro": best, "tried": tried}
        loss, grads = gradients(take)
        told["loss_apart"] = abs(loss - truth[0]) / truth[0]
        told["cosine"] = float(torch.nn.functional.cosine_similarity(grads, truth[1], dim=0))
        told["passed"] = told["loss_apart"] <= LOSS and told["cosine"] >= COSINE
        torch.cuda.reset_peak_memory_stats()
        resting = torch.cuda.memory_allocated()
        take()
        told["step_bytes"] = torch.cuda.max_memory_allocated() - resting
        found["systems"][name] = told
        if told["passed"]:
            able[name] = take
    times: dict[str, list[float]] = {name: [] for name in able}
    for number in range(rounds):
        order = list(able) if number % 2 == 0 else list(able)[::-1]
        for name in order:
            times[name].append(statistics.median(seconds(able[name]) for _ in range(3)))
    for name, taken in times.items():
        told = found["systems"][name]
        told["seconds"] = statistics.median(taken)
        told["tokens_per_second"] = tokens / told["seconds"]
        if "luthier" in times:
            ratios = [own / first for own, first in zip(taken, times["luthier"], strict=True)]
            told["times_luthier"] = [min(ratios), statistics.median(ratios), max(ratios)]
    return found


def settle() -> None:
    """Results are repeatable, as in the engine; torch before 2.12 asks the environment for the room of products at each
    of them, which takes longer than to launch it, and so may ask no more than once, as later ones do."""
    machine.repeatable()
    if not hasattr(torch.backends.cuda, "cublas_workspace_size"):
        one = torch.ones(64, 64, device=DEVICE, requires_grad=True)
        (one @ one).sum().backward()
        os.environ.pop("CUBLAS_WORKSPACE_CONFIG")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--shape", default="1b", choices=list(SHAPES))
    parser.add_argument("--case", default="S1 S2 S3 C1 P1")
    parser.add_argument("--systems", default="luthier flat")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("There is no GPU here.")
    settle()
    results = []
    for case in options.case.split():
        results.append(compare(options.shape, case, options.systems.split(), options.rounds))
        print(json.dumps(results[-1]), flush=True)
        torch.cuda.empty_cache()
    if options.out:
        told = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "results": results}
        options.out.write_text(json.dumps(told, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
