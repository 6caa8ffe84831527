"""TRL's SFTTrainer. Default: what `SFTConfig()` says. Tuned: one precision, no checkpointing, a swept batch.

Where every weight learns, tuned keeps float32 weights under autocast: small updates of bfloat16 ones round to nothing.
Packing stays off in both: TRL knows it to be sound with FlashAttention alone, which no CPU has.
"""

from __future__ import annotations

from typing import Any

from benchmarks.training.drivers import callback
from benchmarks.training.drivers import job as jobs


def main() -> None:
    from datasets import Dataset
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    job = jobs.read()
    rows, record = jobs.rows(job), jobs.Record(job)
    data = Dataset.from_dict({"input_ids": [ids for ids, _ in rows], "labels": [labels for _, labels in rows]})
    tokenizer: Any = AutoTokenizer.from_pretrained(job.model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    told: dict[str, Any] = {**callback.arguments(job), "max_length": None, "train_sampling_strategy": "sequential"}
    told |= {"bf16": job.autocast, "gradient_checkpointing": False} if job.tuned else {}
    # Given a name, TRL loads float32 weights unless told otherwise; the adapter is put on a model loaded the same way.
    dtype = job.dtype if job.tuned else "float32"
    model: Any = AutoModelForCausalLM.from_pretrained(job.model, dtype=dtype, attn_implementation="sdpa")
    if not job.full:
        model = PeftModel.from_pretrained(model, job.adapter, is_trainable=True, autocast_adapter_dtype=not job.tuned)
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(**told),
        train_dataset=data,
        processing_class=tokenizer,
        callbacks=[callback.Clock(job, record)],
    )
    callback.carry_out(trainer, job, record)


if __name__ == "__main__":
    main()
