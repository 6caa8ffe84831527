"""LLaMA-Factory's own `run_exp` with rows that were tokenised beforehand.

Default: its LoRA example (bfloat16 weights under float32 adapters, checkpointing on). Tuned: no checkpointing,
float32 throughout where the job says so, the batch of a sweep; its `pure_bf16` is refused without a GPU. It starts from
the common adapter as from one of its own.
"""

from __future__ import annotations

import contextlib
import importlib.machinery
import sys
import types
from pathlib import Path
from typing import Any

from benchmarks.training.drivers import job as jobs


def main() -> None:
    # It imports torchaudio for sound, which no row here has, and which has no build for this torch.
    sound = sys.modules.setdefault("torchaudio", types.ModuleType("torchaudio"))
    sound.__spec__ = importlib.machinery.ModuleSpec("torchaudio", None)
    from datasets import Dataset, DatasetDict
    from llamafactory.train.tuner import run_exp

    from benchmarks.training.drivers import callback

    job = jobs.read()
    rows, record = jobs.rows(job), jobs.Record(job)
    columns: dict[str, list[Any]] = {
        "input_ids": [ids for ids, _ in rows],
        "attention_mask": [[1] * len(ids) for ids, _ in rows],
        "labels": [labels for _, labels in rows],
        **{kind: [None] * len(rows) for kind in ("images", "videos", "audios")},
    }
    tokenized = Path(job.out) / "trainer" / "rows"
    DatasetDict({"train": Dataset.from_dict(columns)}).save_to_disk(str(tokenized))
    told = callback.arguments(job)
    told["output_dir"] = f"{job.out}/trainer/out"
    adapter = {} if job.full else {"adapter_name_or_path": job.adapter, "lora_target": "all", "lora_rank": 16}
    arguments = {
        **told,
        "bf16": not job.tuned or job.precision == "bfloat16",
        "disable_gradient_checkpointing": job.tuned,
        **adapter,
        "stage": "sft",
        "do_train": True,
        "finetuning_type": "full" if job.full else "lora",
        "model_name_or_path": job.model,
        "template": "default",
        "dataset": "given",
        "tokenized_path": str(tokenized),
        "disable_shuffling": True,
        "cutoff_len": 4096,
        "flash_attn": "sdpa" if job.tuned else "auto",
    }
    with contextlib.suppress(callback.Spent):
        run_exp(arguments, callbacks=[callback.Clock(job, record)])
    record.finish()


if __name__ == "__main__":
    main()
