"""A result is whole, proves itself, carries its template and stop ids, and gives in any reader what training saw."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from luthier.engine import catalogue, install, models, publish
from luthier.spec.errors import NotNow, UserError
from luthier.spec.job import Settings, TrainRequest, make_request
from tests.tiny import CHATML, make_model

IDS = torch.tensor([[5, 17, 300, 42, 99, 260, 7, 11, 350, 23]])
CHAT = [{"role": "user", "content": "Hi  there"}, {"role": "assistant", "content": "Hello."}]


def settings(seed: int = 7, alpha: float = 32.0) -> Settings:
    return Settings(
        epochs=1, batch_size=1, learning_rate=1e-3, steps=1, warmup_steps=0, seed=seed, max_length=64,
        micro_tokens=64, precision="float32", alpha=alpha,
    )  # fmt: skip


def attached(
    base: Path, method: str = "lora", seed: int = 7, alpha: float = 32.0, **more: Any
) -> tuple[Any, TrainRequest, publish.Start]:
    request = make_request({"model": str(base), "data": ["x.jsonl"], "method": method, **more})
    model = models.attach(models.load_base(base, "float32"), request, settings(seed, alpha))
    return model, request, publish.fingerprint(models.trainable(model))


def shake(model: torch.nn.Module, size: float = 0.05) -> None:
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in models.trainable(model).values():
            weight.add_(size * torch.randn_like(weight))


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    result: torch.Tensor = model.eval()(input_ids=IDS).logits
    return result


def save(model: Any, request: TrainRequest, start: publish.Start, base: Path, out: Path, **more: Any) -> list[str]:
    given = {"template": CHATML, "stop_ids": [2, 0], "pad_id": 0, **more}
    return publish.publish(
        model,
        request=request,
        base_folder=base,
        base_hash=catalogue.content_hash(base),
        initial=start,
        out=out,
        **given,
    )


@pytest.mark.parametrize(
    ("method", "rank", "alpha"),
    [("lora", 4, 32.0), ("rslora", 16, 16.0), ("dora", 4, 8.0), ("pissa", 4, 8.0), ("lora", 8, 16.0)],
)
def test_live_reloaded_merged_and_plain_peft_agree(
    tiny: Path, tmp_path: Path, method: str, rank: int, alpha: float
) -> None:
    model, request, start = attached(tiny, method, alpha=alpha, rank=rank)
    plain = logits(AutoModelForCausalLM.from_pretrained(tiny))
    assert torch.allclose(logits(model), plain, atol=1e-4), "an adapter changes nothing before training"
    shake(model)
    live = logits(model)
    assert (live - plain).abs().max() > 0.05
    save(model, request, start, tiny, tmp_path / "model")

    ours = models.load_for_use(str(tmp_path / "model"), "float32")
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny), tmp_path / "model")
    assert ours.adapter
    assert ours.base_folder == tiny
    assert (logits(ours.model) - live).abs().max() < 1e-4
    assert (logits(theirs) - live).abs().max() < 1e-4
    assert (logits(theirs.merge_and_unload()) - live).abs().max() < 1e-4


@pytest.mark.parametrize("method", ["full", "freeze:1"])
@pytest.mark.parametrize("tied", [True, False])
def test_full_models_reload_to_the_same_logits(tmp_path: Path, method: str, tied: bool) -> None:
    base = make_model(tmp_path / "base", tied=tied)
    model, request, start = attached(base, method)
    shake(model)
    live = logits(model)
    save(model, request, start, base, tmp_path / "model")
    saved = load_file(tmp_path / "model" / "model.safetensors")
    assert ("lm_head.weight" in saved) is not tied
    assert saved["model.embed_tokens.weight"].shape == (400, 32)
    loaded = models.load_for_use(str(tmp_path / "model"), "float32")
    assert not loaded.adapter
    assert torch.equal(logits(loaded.model), live)
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config["tie_word_embeddings"] is tied
    assert config["use_cache"] is True
    assert config["dtype"] == "float32"


def test_masters_are_what_is_saved(tiny: Path, tmp_path: Path) -> None:
    request = make_request({"model": str(tiny), "data": ["x"], "method": "full"})
    model = models.attach(models.load_base(tiny, "bfloat16"), request, settings())
    start = publish.fingerprint(models.trainable(model))
    masters = {name: weight.detach().float() + 0.01 for name, weight in models.trainable(model).items()}
    save(model, request, start, tiny, tmp_path / "full", weights=masters)
    saved = load_file(tmp_path / "full" / "model.safetensors")
    assert all(torch.equal(saved[name], master.bfloat16()) for name, master in masters.items())

    adapter_request = make_request({"model": str(tiny), "data": ["x"], "rank": 4})
    adapter = models.attach(models.load_base(tiny, "bfloat16"), adapter_request, settings())
    learnt = models.trainable(adapter)
    assert {weight.dtype for weight in learnt.values()} == {torch.bfloat16}
    start = publish.fingerprint(learnt)
    masters = {name: weight.detach().float() + 1e-4 for name, weight in learnt.items()}
    save(adapter, adapter_request, start, tiny, tmp_path / "adapter", weights=masters)
    state = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}
    name = next(iter(masters))
    assert torch.equal(state[name.replace(".default", "")], masters[name])


def test_a_clean_process_renders_as_training_did(tiny: Path, tmp_path: Path) -> None:
    base = make_model(tmp_path / "base", template=None)
    model, request, start = attached(base)
    shake(model)
    out = tmp_path / "model"
    save(model, request, start, base, out)
    program = (
        "import sys, json; from transformers import AutoTokenizer\n"
        "tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])\n"
        "print(json.dumps(tokenizer.apply_chat_template(json.loads(sys.argv[2]), tokenize=False)))"
    )
    run = [sys.executable, "-c", program, str(out), json.dumps(CHAT)]
    shown = json.loads(subprocess.run(run, check=True, capture_output=True, text=True).stdout)
    assert shown == "<|im_start|>user\nHi  there<|im_end|>\n<|im_start|>assistant\nHello.<|im_end|>\n"
    assert (out / "chat_template.jinja").read_text() == CHATML
    assert json.loads((out / "tokenizer_config.json").read_text())["chat_template"] == CHATML


def test_every_stop_id_is_declared_and_the_note_describes_the_files(tiny: Path, tmp_path: Path) -> None:
    model, request, start = attached(tiny)
    shake(model)
    out = tmp_path / "model"
    assert save(model, request, start, tiny, out) == []
    generation = json.loads((out / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [2, 0]
    assert generation["pad_token_id"] == 0
    note = json.loads((out / "luthier.json").read_text())
    assert note["kind"] == "adapter"
    assert note["method"] == "lora"
    assert note["base"] == {"name": str(tiny), "folder": str(tiny), "hash": catalogue.content_hash(tiny)}
    assert set(note["files"]) == {path.name for path in out.iterdir()} - {"luthier.json"}
    assert install.verify(out) == []
    assert [path.name for path in tmp_path.iterdir()] == ["model"], "no work folder is left"


def test_base_with_a_contradicting_generation_config_still_saves(tiny: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny, base)
    (base / "generation_config.json").write_text('{"do_sample": false, "temperature": 0.9, "max_new_tokens": 9}')
    model, request, start = attached(base, "full")
    given = {"template": CHATML, "stop_ids": [2], "pad_id": 0}
    notes = publish.dry_run(model, request=request, base_folder=base, out=tmp_path / "model", **given)  # type: ignore[arg-type]
    assert notes == [
        "generation_config.json: temperature of the base left out, as it does not sample (do_sample is not true)."
    ]
    shake(model)
    assert save(model, request, start, base, tmp_path / "model", **given) == notes
    saved = json.loads((tmp_path / "model" / "generation_config.json").read_text())
    assert saved == {"do_sample": False, "max_new_tokens": 9, "eos_token_id": 2, "pad_token_id": 0}
    AutoModelForCausalLM.from_pretrained(tmp_path / "model").save_pretrained(tmp_path / "again")


def test_sampling_bases_keep_their_settings(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text('{"do_sample": true, "temperature": 0.7, "top_k": 20}')
    values, notes = publish.generation_settings(tmp_path, [2], 0)
    assert notes == []
    assert values == {"do_sample": True, "temperature": 0.7, "top_k": 20, "eos_token_id": 2, "pad_token_id": 0}
    (tmp_path / "generation_config.json").write_text('{"do_sample": true, "max_new_tokens": -3, "bos_token_id": 3}')
    values, notes = publish.generation_settings(tmp_path, [2, 9], 0)
    assert values == {"bos_token_id": 3, "eos_token_id": [2, 9], "pad_token_id": 0}
    assert len(notes) == 1


def test_dry_run_refuses_a_place_that_cannot_be_written(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, request, _ = attached(tiny)
    given: dict[str, Any] = {"template": CHATML, "stop_ids": [2], "pad_id": 0}
    (tmp_path / "file").write_text("")
    with pytest.raises(NotNow, match="cannot be written"):
        publish.dry_run(model, request=request, base_folder=tiny, out=tmp_path / "file" / "model", **given)
    assert publish.dry_run(model, request=request, base_folder=tiny, out=tmp_path / "model", **given) == []
    assert [path.name for path in tmp_path.iterdir()] == ["file"]

    class Full:
        free = 1000

    monkeypatch.setattr(shutil, "disk_usage", lambda _: Full)
    with pytest.raises(NotNow, match=r"needs 50 MB, 0 MB are free"):
        publish.dry_run(model, request=request, base_folder=tiny, out=tmp_path / "model", **given)


def test_unchanged_and_broken_weights_are_kept_but_not_published(tiny: Path, tmp_path: Path) -> None:
    model, request, start = attached(tiny)
    out = tmp_path / "model"
    with pytest.raises(UserError, match="No weight differs") as unchanged:
        save(model, request, start, tiny, out)
    assert str(tmp_path / "model.rejected") in unchanged.value.message
    shake(model)
    with torch.no_grad():
        next(iter(models.trainable(model).values()))[0, 0] = float("nan")
    with pytest.raises(UserError, match="not finite"):
        save(model, request, start, tiny, out)
    assert not out.exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.rejected", "model.rejected-2"]
    assert (tmp_path / "model.rejected-2" / "adapter_model.safetensors").is_file()


def test_full_training_that_bfloat16_swallowed_is_rejected(tiny: Path, tmp_path: Path) -> None:
    request = make_request({"model": str(tiny), "data": ["x"], "method": "full"})
    model = models.attach(models.load_base(tiny, "bfloat16"), request, settings())
    start = publish.fingerprint(models.trainable(model))
    masters = {name: weight.detach().float() * (1 + 1e-6) for name, weight in models.trainable(model).items()}
    with pytest.raises(UserError, match="No weight differs"):
        save(model, request, start, tiny, tmp_path / "model", weights=masters)


def test_an_older_result_is_replaced_whole(tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "model"
    out.mkdir()
    (out / "stale").write_text("old")
    model, request, start = attached(tiny)
    shake(model)
    save(model, request, start, tiny, out)
    assert not (out / "stale").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_same_seed_same_bytes(tiny: Path, tmp_path: Path) -> None:
    files = []
    for index, seed in enumerate((7, 7, 8)):
        model, request, start = attached(tiny, "lora", seed)
        with torch.no_grad():
            for weight in models.trainable(model).values():
                weight.add_(0.5)
        save(model, request, start, tiny, tmp_path / str(index))
        files.append(
            [
                (tmp_path / str(index) / name).read_bytes()
                for name in ("adapter_model.safetensors", "adapter_config.json")
            ]
        )
    assert files[0] == files[1]
    assert files[0][0] != files[2][0]
