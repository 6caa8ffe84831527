"""The real 135M model, through the command line as a person uses it: memorise, answer, stop; memory; two processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests import tiny as tiny_models
from tests.engine.runs import chats, events, weights, write

ROOT = Path(__file__).parents[2]


def luthier(*arguments: str, code: int = 0, timeout: int = 280) -> str:
    """Output of one command. One thread: other tests run beside this one."""
    here = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "luthier.cli", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=here, timeout=timeout, stdin=subprocess.DEVNULL)
    assert done.returncode == code, f"{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    return done.stdout


def last(output: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(output.splitlines()[-1])
    return found


def test_memorised_completions_stop(tmp_path: Path, smollm2: Path) -> None:
    """B05: pad and end are the same token here; the end is learnt all the same, and greedy answers stop."""
    colours = ("red", "green", "blue", "pink", "grey", "gold", "black", "white")
    rows = [{"prompt": f"color {n} ->", "completion": f" {colour}"} for n, colour in enumerate(colours)]
    data = write(tmp_path / "colours.jsonl", rows)
    out = luthier(
        "train", "--model", "smollm2-135m-instruct", "--data", str(data), "--out", str(tmp_path / "run"),
        "--epochs", "25", "--batch-size", "8", "--seed", "1", "--schedule", "constant", "--json",
    )  # fmt: skip
    final = last(out)
    assert final["status"] == "succeeded" and final["report"]["train_loss_last"] < 0.2
    from luthier.data.render import Renderer
    from luthier.engine import generate
    from luthier.engine.models import load_for_use

    loaded = load_for_use(str(tmp_path / "run"), "bfloat16")
    renderer = Renderer.load(loaded.folder)
    prompts = [renderer.completion_prompt(str(row["prompt"])) for row in rows]
    done = generate.generate(
        loaded.model, prompts, renderer.stop_ids, renderer.tokenizer.pad_id, generate.Sampling(max_tokens=8),
        context=512,
    )  # fmt: skip
    answers = [renderer.tokenizer.decode(each.ids[:-1]) for each in done]
    assert [each.finish_reason for each in done] == ["stop"] * 8
    assert sum(answer == row["completion"] for answer, row in zip(answers, rows, strict=True)) >= 7


def test_a_full_micro_batch_stays_under_four_gigabytes(tmp_path: Path, smollm2: Path) -> None:
    """LoRA on the 135M model, 2,048 physical tokens in one pass, every one of them learnt."""
    text = tmp_path / "t.txt"
    text.write_text("".join(f"Line {n}: the {n * 7919} birds of day {n * 31} flew.\n" for n in range(400)))
    out = luthier(
        "train", "--model", "smollm2-135m-instruct", "--data", str(text), "--out", str(tmp_path / "run"),
        "--max-steps", "2", "--batch-size", "1", "--max-length", "2048", "--seed", "1", "--json",
    )  # fmt: skip
    lines = [json.loads(line) for line in out.splitlines()]
    assert max(line["physical_tokens"] for line in lines if line.get("type") == "step") == 2048
    assert lines[-1]["report"]["peak_memory_bytes"] < 4e9


@pytest.fixture
def base_model(tmp_path: Path) -> Path:
    """A base without a chat template, whose own end token is not ChatML's."""
    folder = tiny_models.make_model(tmp_path / "base", template=None)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "eos_token": "<|endoftext|>"}))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 0, "pad_token_id": 0}))
    return folder


def test_a_base_given_a_template_learns_to_stop(tmp_path: Path, base_model: Path) -> None:
    """B06, B50: the turn's end is a stop token of the result, and the template travels with it."""
    from transformers import AutoTokenizer

    data = write(tmp_path / "d.jsonl", chats(4))
    run = tmp_path / "run"
    luthier(
        "train", "--model", str(base_model), "--data", str(data), "--out", str(run), "--epochs", "25",
        "--method", "full", "--learning-rate", "1e-2", "--batch-size", "4", "--seed", "3", "--precision", "float32",
    )  # fmt: skip
    stops = json.loads((run / "model" / "generation_config.json").read_text())["eos_token_id"]
    tokenizer = AutoTokenizer.from_pretrained(run / "model")
    assert {tokenizer.convert_tokens_to_ids("<|im_end|>"), 0} == set(stops)
    out = luthier("chat", str(run), "--message", "say number 2 again", "--json", "--precision", "float32")
    answer = last(out)
    assert answer["finish_reason"] == "stop" and "<|im_end|>" not in json.dumps(answer)
    assert answer["content"].strip()


def test_two_processes_from_the_command_line(tmp_path: Path, tiny: Path) -> None:
    from luthier.spec.run import RunFolder

    data = write(tmp_path / "d.jsonl", chats(8))
    common = ["--model", str(tiny), "--data", str(data), "--epochs", "1", "--batch-size", "4", "--seed", "5", "--json"]
    common += ["--precision", "float32", "--micro-tokens", "60"]
    one = last(luthier("train", *common, "--out", str(tmp_path / "one")))
    two = last(luthier("train", *common, "--out", str(tmp_path / "two"), "--processes", "2"))
    assert one["status"] == two["status"] == "succeeded"
    left, right = (weights(RunFolder(tmp_path / name)) for name in ("one", "two"))
    # The mean: Adam makes whole steps of rounding noise near zero.
    assert all(float((left[name] - right[name]).abs().mean()) < 1e-4 for name in left)
    assert len(events(RunFolder(tmp_path / "two"), "started")) == 1
