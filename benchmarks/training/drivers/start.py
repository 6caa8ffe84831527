"""The adapter that everybody starts from: LoRA r16, alpha 32, on every linear layer but the head, as a PEFT folder.

B is small but not zero, or the gradient of A would be zero at the first step and the gate would see half of it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

LAYERS = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]


def make(model_folder: str, out: Path, seed: int = 0) -> None:
    """Write the adapter folder `out` for the base in `model_folder`."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    torch.manual_seed(seed)
    config = LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, lora_dropout=0.0, target_modules=LAYERS)
    made = get_peft_model(model, config)
    for name, weight in made.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.01)
    for name, weight in made.named_parameters():
        if "lora_" in name:  # everybody starts from the same numbers, whatever they keep them in
            weight.data = weight.data.bfloat16().float()
    made.save_pretrained(out)
