"""Tokens a second of a replica and of transformers' `generate`, side by side, in one run on the same machine.

    python -m benchmarks.serving [--model smollm2-135m-instruct] [--streams 1 4 16] [--tokens 64] [--rounds 3]

First a gate: on the same prompts, base and adapters, both must give the same greedy tokens in float32; else nothing is
measured. Then for each number of streams, with no adapter and with four different ones among them, the replica (its own
process, spoken to through its pipes, as the server does) and `generate` (one batch; adapters through PEFT's mixed
batches) answer prompts of 64 tokens that share nothing, and rounds take turns so that both see the same neighbours.
Reported is the median round: all generated tokens over the time from the first ask to the last token, prompts included.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

PROMPT = 64
ADAPTERS = 4
GATE_TOKENS = 24


def prompts(count: int, start: int, vocabulary: int) -> list[list[int]]:
    """Prompts that share no prefix with each other, nor with those of another `start`."""
    return [
        [
            (97 * (start + number) + 13 * place * place + 29 * place + 100) % (vocabulary - 200) + 100
            for place in range(PROMPT)
        ]
        for number in range(count)
    ]


def make_adapters(model: Any, base: Path, folder: Path) -> list[Path]:
    """Random LoRA adapters of rank 8 on all linear layers, strong enough to change answers."""
    import torch
    from peft import LoraConfig, get_peft_model

    from luthier.engine import adapters, catalogue

    found = []
    for number in range(ADAPTERS):
        torch.manual_seed(number)
        config = LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16, target_modules=adapters.targets_of(model, []))
        made = get_peft_model(model, config)
        for name, weight in made.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(weight, std=0.02)
        place = folder / f"adapter-{number}"
        made.save_pretrained(place)
        note = {"base": {"name": base.name, "folder": str(base), "hash": catalogue.content_hash(base)}}
        (place / "luthier.json").write_text(json.dumps(note))
        model = made.unload()
        found.append(place)
    return found


class Replica:
    """The process, and what it answers to a batch of asks."""

    def __init__(self, base: Path, precision: str) -> None:
        command = [sys.executable, "-m", "luthier.serve.replica", "--base", str(base), "--precision", precision]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.ready = self._line()
        assert self.ready.get("ready"), self.ready

    def _line(self) -> dict[str, Any]:
        assert self.process.stdout
        return json.loads(self.process.stdout.readline())  # type: ignore[no-any-return]

    def answer(self, asked: Sequence[list[int]], owners: Sequence[Path | None], tokens: int) -> list[list[int]]:
        lines = [
            {
                "do": "generate",
                "id": str(number),
                "prompt": prompt,
                "max_tokens": tokens,
                "temperature": 0,
                "adapter": None if owner is None else str(owner),
            }
            for number, (prompt, owner) in enumerate(zip(asked, owners, strict=True))
        ]
        assert self.process.stdin
        self.process.stdin.write("".join(json.dumps(line) + "\n" for line in lines).encode())
        self.process.stdin.flush()
        given: list[list[int]] = [[] for _ in asked]
        left = len(asked)
        while left:
            part = self._line()
            given[int(part["id"])] += [token["id"] for token in part.get("tokens", [])]
            left -= "finish" in part
            assert part.get("finish") in (None, "length"), part
        return given

    def close(self) -> None:
        self.process.communicate()


class Transformers:
    """`generate` on one batch; with adapters, PEFT chooses among them row by row."""

    def __init__(self, base: Path, places: Sequence[Path], precision: Any) -> None:
        from peft import PeftModel

        from luthier.engine import models

        self.plain: Any = models.load_base(base, precision).eval().requires_grad_(False)
        self.plain.config.use_cache = True
        self.mixed: Any = PeftModel.from_pretrained(
            models.load_base(base, precision), places[0], adapter_name=str(places[0]), autocast_adapter_dtype=False
        ).eval()
        self.mixed.config.use_cache = True
        for place in places[1:]:
            self.mixed.load_adapter(place, adapter_name=str(place), autocast_adapter_dtype=False)

    def answer(self, asked: Sequence[list[int]], owners: Sequence[Path | None], tokens: int) -> list[list[int]]:
        import torch

        ids = torch.tensor(asked)
        settings = {
            "max_new_tokens": tokens,
            "min_new_tokens": tokens,
            "do_sample": False,
            "attention_mask": torch.ones_like(ids),
            "pad_token_id": 0,
            "eos_token_id": None,
        }
        with torch.inference_mode():
            if any(owners):
                names = ["__base__" if owner is None else str(owner) for owner in owners]
                given = self.mixed.generate(input_ids=ids, adapter_names=names, **settings)
            else:
                given = self.plain.generate(input_ids=ids, **settings)
        return given[:, PROMPT:].tolist()  # type: ignore[no-any-return]


def gate(base: Path, places: Sequence[Path], vocabulary: int) -> None:
    """Raises SystemExit unless both give the same greedy tokens, base and adapters, in float32."""
    ours, theirs = Replica(base, "float32"), Transformers(base, places, "float32")
    asked = prompts(1 + len(places), 10_000, vocabulary)
    owners = [None, *places]
    found = ours.answer(asked, owners, GATE_TOKENS)
    ours.close()
    wanted = [theirs.answer([prompt], [owner], GATE_TOKENS)[0] for prompt, owner in zip(asked, owners, strict=True)]
    if found != wanted:
        raise SystemExit(f"The gate: answers differ, so nothing is measured.\n{found}\n{wanted}")
    if len({tuple(answer) for answer in found}) < len(found):
        raise SystemExit("The gate: adapters changed nothing, so nothing is measured.")
    print(f"gate: {len(found)} answers of {GATE_TOKENS} greedy tokens are equal in float32", flush=True)


def measure(options: argparse.Namespace, base: Path, places: Sequence[Path], precision: str) -> list[dict[str, Any]]:
    ours, theirs = Replica(base, precision), Transformers(base, places, precision)
    vocabulary, start, rows = ours.ready["vocabulary"], 0, []
    for count in options.streams:
        for adapters in (0, ADAPTERS):
            owners = [places[number % adapters] if adapters else None for number in range(count)]
            speeds: dict[str, list[float]] = {"luthier": [], "transformers": []}
            for number in range(options.rounds + 1):
                for name, one in (("luthier", ours), ("transformers", theirs)):
                    start += count
                    asked = prompts(count, start, vocabulary)
                    begun = time.perf_counter()
                    given = one.answer(asked, owners, options.tokens if number else 8)
                    spent = time.perf_counter() - begun
                    if number:  # the first round warms up
                        speeds[name].append(sum(map(len, given)) / spent)
            row = {name: round(statistics.median(values), 1) for name, values in speeds.items()}
            rows.append({"streams": count, "adapters": min(adapters, count), **row})
            times = row["luthier"] / row["transformers"]
            print(
                f"{count:3} streams, {min(adapters, count)} adapters: luthier {row['luthier']:6.1f} tokens/s, "
                f"transformers {row['transformers']:6.1f}  ({times:.1f}x)",
                flush=True,
            )
    ours.close()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serving", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write the numbers here, too")
    options = parser.parse_args()

    import torch

    from luthier.engine import catalogue, models

    base = catalogue.resolve(options.model)
    precision = models.default_precision()
    load = os.getloadavg()[0]
    print(f"{base.name}, {precision}, {torch.get_num_threads()} threads, load before: {load:.1f}", flush=True)
    if load > 0.5:
        print("Something else is running: these numbers will be lower than the machine's.", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        model: Any = models.load_base(base, "float32")
        places = make_adapters(model, base, Path(folder))
        gate(base, places, model.config.vocab_size)
        rows = measure(options, base, places, precision)
    if options.json:
        where = {"model": base.name, "precision": precision, "threads": torch.get_num_threads(), "load": load}
        options.json.write_text(json.dumps({**where, "torch": torch.__version__, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
