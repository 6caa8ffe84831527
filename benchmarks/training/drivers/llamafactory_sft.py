"""LLaMA-Factory's own `run_exp` with rows that were tokenised beforehand.

Default: its LoRA example (bfloat16 weights under float32 adapters, checkpointing on). Tuned: no checkpointing,
float32 throughout where the job says so (to leave its bf16 flag out is not enough for that), the batch of a sweep; its
`pure_bf16` is refused without a GPU. It starts from the common adapter as from one of its own.
"""

from __future__ import annotations

import contextlib
import importlib.machinery
import json
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
        "model_name_or_path": _model(job),
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


def _model(job: jobs.Job) -> str:
    """The model's folder. LLaMA-Factory loads weights in the dtype that config.json names and has no setting for it, so
    float32 is asked for by a folder that names it, as a user would have to."""
    if not (job.tuned and job.precision == "float32"):
        return job.model
    folder = Path(job.out) / "model"
    folder.mkdir()
    for path in Path(job.model).iterdir():
        if path.name != "config.json":
            (folder / path.name).symlink_to(path)
    config = json.loads((Path(job.model) / "config.json").read_text(encoding="utf-8"))
    config.pop("torch_dtype", None)
    (folder / "config.json").write_text(json.dumps({**config, "dtype": "float32"}), encoding="utf-8")
    return str(folder)


if __name__ == "__main__":
    main()
