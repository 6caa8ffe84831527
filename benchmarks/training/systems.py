"""Who takes part: each trainer with each setting, its environment, and what "tuned" came to.

A trainer that is tuned takes the micro-batch that a sweep found best for it (sweep.py); the others keep their own.
Does not know: how a run is started.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from benchmarks.training.workloads import GEMMA, Case

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True, eq=False)
class System:
    """One line of a table. `environment` "" is Luthier's own."""

    name: str
    title: str
    driver: str
    setting: str
    environment: str
    tuning: str
    swept: bool = False  # its micro-batch is chosen by trying
    gemma: bool = True  # can train Gemma here
    full: bool = True  # can train every weight here

    @property
    def requirements(self) -> Path:
        return HERE / "requirements" / f"{self.environment}.txt"

    def fits(self, case: Case) -> bool:
        return (self.full or not case.full) and (self.gemma or case.model != GEMMA)


QUICKER = "bfloat16 or float32, whichever the processor multiplies faster"
WHOLE = "(all weights: float32, under autocast where bfloat16 is the quicker)"
SYSTEMS: dict[str, System] = {
    system.name: system
    for system in (
        System("luthier", "Luthier", "luthier_engine", "tuned", "", "nothing: as `luthier train` runs"),
        System(
            "flat",
            "flat loop tuned by hand",
            "flat",
            "tuned",
            "huggingface",
            f"{QUICKER}, float32 masters, maskless SDPA, head at learnt positions in one pass, "
            "no checkpointing, rows of a step sorted by length",
            True,
        ),
        System(
            "trl-tuned",
            "TRL 1.16, tuned",
            "trl_sft",
            "tuned",
            "huggingface",
            f"{QUICKER}, {WHOLE}, no checkpointing, SDPA, rows of a "
            "step sorted by length; packing is off: TRL knows it to be sound with FlashAttention alone",
            True,
        ),
        System("trl", "TRL 1.16", "trl_sft", "default", "huggingface", "nothing: `SFTConfig()`"),
        System(
            "trainer-tuned",
            "Trainer + PEFT, tuned",
            "trainer",
            "tuned",
            "huggingface",
            f"{QUICKER}, {WHOLE}, SDPA, rows of a step sorted by length",
            True,
        ),
        System(
            "trainer", "Trainer + PEFT", "trainer", "default", "huggingface", "nothing: `TrainingArguments(bf16=True)`"
        ),
        System(
            "llamafactory-tuned",
            "LLaMA-Factory 0.9.5, tuned",
            "llamafactory_sft",
            "tuned",
            "llamafactory",
            f"{QUICKER} (float32 by a config.json that names it; its `pure_bf16` is refused without a GPU), no "
            "checkpointing, SDPA, rows of a step sorted by length",
            True,
        ),
        System(
            "llamafactory",
            "LLaMA-Factory 0.9.5",
            "llamafactory_sft",
            "default",
            "llamafactory",
            "nothing: its LoRA example",
        ),
        System(
            "torchtune-tuned",
            "torchtune 0.6.1, tuned",
            "torchtune_lora",
            "tuned",
            "torchtune",
            f"{QUICKER} throughout, no checkpointing, rows of a step sorted by length",
            True,
            gemma=False,
            full=False,
        ),
    )
}
REFERENCE = System("reference", "float32 reference, a row at a time", "flat", "reference", "", "")
