"""torchtune's recipe `lora_finetune_single_device` on rows of ids: in one precision throughout, bfloat16 as it ships.

Its Llama keeps each head's rotary halves interleaved, so rows of B for queries and keys are put in its order on the way
in and back in ours on the way out. Tuned differs from default in the order of a step's rows and in the micro-batch.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.training.drivers import job as jobs

HERE = "benchmarks.training.drivers.torchtune_lora"
NAMES = {  # ours -> torchtune's
    "self_attn.q_proj": "attn.q_proj",
    "self_attn.k_proj": "attn.k_proj",
    "self_attn.v_proj": "attn.v_proj",
    "self_attn.o_proj": "attn.output_proj",
    "mlp.gate_proj": "mlp.w1",
    "mlp.up_proj": "mlp.w3",
    "mlp.down_proj": "mlp.w2",
    "lora_A": "lora_a",
    "lora_B": "lora_b",
}


class Padding:
    """What the recipe wants of a tokenizer when rows are ids already."""

    pad_id = 0


def given(tokenizer: Padding) -> list[dict[str, list[int]]]:
    """The rows of the job, as the recipe's collator wants them."""
    return [{"tokens": ids, "labels": labels} for ids, labels in jobs.rows(jobs.read())]


def constant(optimizer: Any, num_training_steps: int, last_epoch: int) -> Any:
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0, last_epoch=last_epoch)


def theirs(name: str) -> str:
    """A parameter's name in PEFT's file as torchtune has it."""
    name = name.removeprefix("base_model.model.model.")
    for own, other in NAMES.items():
        name = name.replace(own, other)
    return name


def turned(name: str, value: torch.Tensor, head_dim: int, back: bool) -> torch.Tensor:
    """Rows of B of queries and keys, from halves to pairs within each head (`back`: from pairs to halves)."""
    if "lora_B" not in name or not ("q_proj" in name or "k_proj" in name):
        return value
    split = (head_dim // 2, 2) if back else (2, head_dim // 2)
    return value.view(-1, *split, value.shape[-1]).transpose(1, 2).reshape(value.shape)


def settings(job: jobs.Job, model: dict[str, Any]) -> dict[str, Any]:
    micro = min(job.micro or 4, job.rows_per_step)
    out = f"{job.out}/trainer"
    return {
        "output_dir": out,
        "model": {
            "_component_": "torchtune.models.llama3_2.lora_llama3_2",
            "lora_attn_modules": ["q_proj", "k_proj", "v_proj", "output_proj"],
            "apply_lora_to_mlp": True,
            "lora_rank": 16,
            "lora_alpha": 32,
            "vocab_size": model["vocab_size"],
            "num_layers": model["num_hidden_layers"],
            "num_heads": model["num_attention_heads"],
            "num_kv_heads": model["num_key_value_heads"],
            "embed_dim": model["hidden_size"],
            "intermediate_dim": model["intermediate_size"],
            "max_seq_len": 4096,
            "norm_eps": model["rms_norm_eps"],
            "rope_base": int(model.get("rope_theta") or model["rope_parameters"]["rope_theta"]),
            "scale_factor": 1,  # no scaling of rotary frequencies
        },
        "tokenizer": {"_component_": f"{HERE}.Padding"},
        "dataset": {"_component_": f"{HERE}.given"},
        "checkpointer": {
            "_component_": "torchtune.training.FullModelHFCheckpointer",
            "checkpoint_dir": job.model,
            "checkpoint_files": ["model.safetensors"],
            "output_dir": out,
            "model_type": "LLAMA3_2",
        },
        "resume_from_checkpoint": False,
        "seed": 0,
        "shuffle": False,
        "batch_size": micro,
        "gradient_accumulation_steps": job.rows_per_step // micro,
        "epochs": 1,
        "max_steps_per_epoch": job.steps,
        "clip_grad_norm": 1.0,
        "optimizer": {"_component_": "torch.optim.AdamW", "fused": True, "weight_decay": 0.0, "lr": job.rate},
        "lr_scheduler": {"_component_": f"{HERE}.constant"},
        "loss": {"_component_": "torchtune.modules.loss.CEWithChunkedOutputLoss"},
        "compile": False,
        "metric_logger": {"_component_": "torchtune.training.metric_logging.DiskLogger", "log_dir": f"{out}/logs"},
        "device": "cpu",
        "dtype": "bf16" if job.precision == "bfloat16" else "fp32",
        "enable_activation_checkpointing": False,
        "enable_activation_offloading": False,
    }


class Spent(Exception):
    """The steps or the seconds of the job are at an end."""


def main() -> None:
    from omegaconf import OmegaConf
    from safetensors.torch import load_file

    job = jobs.read()
    model = json.loads((Path(job.model) / "config.json").read_text(encoding="utf-8"))
    head_dim = model.get("head_dim") or model["hidden_size"] // model["num_attention_heads"]
    record = jobs.Record(job)
    told = OmegaConf.create(settings(job, model))
    recipe = the_recipe()(cfg=told)
    recipe.setup(cfg=told)
    start = load_file(Path(job.adapter) / "adapter_model.safetensors")
    own = dict(recipe._model.named_parameters())
    with torch.no_grad():
        for name, value in start.items():
            own[theirs(name)].copy_(turned(name, value, head_dim, back=False))

    def named(of_gradients: bool) -> Iterator[tuple[str, Any]]:
        for name in start:
            weight = own[theirs(name)]
            value = weight.grad if of_gradients else weight.detach()
            yield name, None if value is None else turned(name, value, head_dim, back=True)

    _put_clock(recipe, record, named, told["batch_size"])
    record.notes["micro"] = told["batch_size"]
    record.begin()
    with contextlib.suppress(Spent):
        recipe.train()
    record.finish()


def the_recipe() -> Any:
    """The recipe's class; recipes lie beside torchtune and are files, no package."""
    import torchtune

    path = Path(torchtune.__file__).parent.parent / "recipes" / "lora_finetune_single_device.py"
    spec = importlib.util.spec_from_file_location("recipe", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.LoRAFinetuneRecipeSingleDevice


def _put_clock(recipe: Any, record: jobs.Record, named: Any, micro: int) -> None:
    loss_step, step, log = recipe._loss_step, recipe._optimizer.step, recipe._metric_logger.log_dict
    begun = False

    def loss_step_timed(batch: Any) -> Any:
        nonlocal begun
        if begun:
            record.part(micro)
            if record.over:
                raise Spent
        begun = True
        return loss_step(batch)

    def step_seen(*given: Any, **more: Any) -> Any:
        record.gradients(named(True))
        return step(*given, **more)

    def log_seen(measured: dict[str, Any], step: int) -> None:  # the last thing that a step does
        nonlocal begun
        log(measured, step)
        record.losses.append(float(measured["loss"]))
        record.norms.append(float(measured["grad_norm"]))
        record.step_done()
        record.learnt(named(False))
        begun = False
        if record.over or len(record.steps) >= record.job.steps:
            raise Spent

    recipe._loss_step, recipe._optimizer.step, recipe._metric_logger.log_dict = loss_step_timed, step_seen, log_seen


if __name__ == "__main__":
    main()
