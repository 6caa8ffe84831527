"""transformers' Trainer with PEFT. Default: as its documentation shows it. Tuned: one precision, a swept batch.

Where every weight learns, tuned keeps float32 weights under autocast: small updates of bfloat16 ones round to nothing.
"""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.training.drivers import callback
from benchmarks.training.drivers import job as jobs


def load(job: jobs.Job) -> Any:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    own: dict[str, Any] = {"dtype": getattr(torch, job.dtype), "attn_implementation": "sdpa"} if job.tuned else {}
    model: Any = AutoModelForCausalLM.from_pretrained(job.model, **own)
    if job.full:
        return model
    return PeftModel.from_pretrained(model, job.adapter, is_trainable=True, autocast_adapter_dtype=not job.tuned)


def main() -> None:
    from datasets import Dataset
    from transformers import AutoTokenizer, DataCollatorForSeq2Seq, Trainer, TrainingArguments

    job = jobs.read()
    rows, record = jobs.rows(job), jobs.Record(job)
    data = Dataset.from_dict({"input_ids": [ids for ids, _ in rows], "labels": [labels for _, labels in rows]})
    tokenizer: Any = AutoTokenizer.from_pretrained(job.model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    tokenizer.padding_side = "right"
    told = callback.arguments(job)
    trainer = Trainer(
        model=load(job),
        args=TrainingArguments(**told, train_sampling_strategy="sequential", bf16=job.autocast),
        train_dataset=data,
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        callbacks=[callback.Clock(job, record)],
    )
    callback.carry_out(trainer, job, record)


if __name__ == "__main__":
    main()
