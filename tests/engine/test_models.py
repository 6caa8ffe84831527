"""Bases load or are refused, the right weights learn, and an adapter only ever sits on its own base."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from luthier.engine import adapters, catalogue, machine, models, publish
from luthier.spec.errors import BadSetting, NotFound
from luthier.spec.job import make_request
from tests.engine.test_publish import attached, logits, save, settings, shake
from tests.tiny import make_model

ALL = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]


@pytest.fixture(scope="module")
def adapter(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained adapter on the tiny base. Read only."""
    out = tmp_path_factory.mktemp("adapter") / "model"
    model, request, start = attached(tiny, rank=4)
    shake(model)
    save(model, request, start, tiny, out)
    return out


@pytest.fixture
def copy(adapter: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(adapter, tmp_path / "adapter"))


def change(folder: Path, how: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    path = folder / "adapter_model.safetensors"
    save_file(how(load_file(path)), path)


def change_config(folder: Path, **values: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_load_base(tiny: Path, precision: models.Precision) -> None:
    model = models.load_base(tiny, precision)
    assert {weight.dtype for weight in model.parameters()} == {models.DTYPES[precision]}
    assert model.config.use_cache is False


def test_default_precision_is_one_this_machine_multiplies() -> None:
    assert models.default_precision() in ("bfloat16", "float32")


@pytest.mark.parametrize(
    ("gain", "room", "wanted"),
    [(1.5, 1 << 40, "float32"), (1.1, 1 << 40, "bfloat16"), (0.5, 1 << 40, "bfloat16"), (1.5, 1, "bfloat16")],
)
def test_float32_where_it_is_quicker_and_fits(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, gain: float, room: int, wanted: str
) -> None:
    monkeypatch.setattr(models, "default_precision", lambda: "bfloat16")
    monkeypatch.setattr(machine, "product_rate", lambda dtype: gain if dtype == torch.float32 else 1.0)
    monkeypatch.setattr(machine, "memory_room", lambda: room)
    precision, why = models.training_precision(tiny)
    assert precision == wanted
    assert bool(why) == (wanted == "float32")


def test_a_product_is_timed_once_and_threads_are_as_before() -> None:
    threads = torch.get_num_threads()
    assert machine.product_rate(torch.float32) == machine.product_rate(torch.float32) > 0
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral", "gemma3", "gpt2", "gpt_neox"])
def test_families_attach_train_and_reload(tmp_path: Path, family: str) -> None:
    base = make_model(tmp_path / "base", family=family)
    model, request, start = attached(base, rank=4)
    assert all("lora_" in name for name in models.trainable(model))
    shake(model)
    live = logits(model)
    save(model, request, start, base, tmp_path / "model")
    assert (logits(models.load_for_use(str(tmp_path / "model"), "float32").model) - live).abs().max() < 1e-4
    frozen, _, _ = attached(base, "freeze:1")
    assert models.trainable(frozen)
    assert all(".1." in name for name in models.trainable(frozen))


def test_what_learns(tiny: Path) -> None:
    model, _, _ = attached(tiny, rank=4)
    names = list(models.trainable(model))
    assert len(names) == 2 * 7 * 2
    assert sorted({name.split(".")[-4] for name in names}) == ALL
    assert not any("lm_head" in name or "embed" in name for name in names)
    assert models.describe(model).endswith(": down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj.")

    full, _, _ = attached(tiny, "full")
    assert len(models.trainable(full)) == len(list(full.named_parameters()))
    assert "weights learn (100 %)" in models.describe(full)
    half, _, _ = attached(tiny, "freeze:1")
    assert {name.split(".")[2] for name in models.trainable(half)} == {"1"}
    with pytest.raises(BadSetting, match="found freeze:3; this model has 2 layers"):
        attached(tiny, "freeze:3")


def test_the_seed_reaches_the_adapter(tiny: Path) -> None:
    for method in ("lora", "pissa", "dora"):
        first, second, other = (models.trainable(attached(tiny, method, seed)[0]) for seed in (3, 3, 4))
        assert all(torch.equal(first[name], second[name]) for name in first)
        if method != "dora":
            assert any(not torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize(
    ("targets", "words"),
    [
        (["nope"], r"'nope', no module of this model; wanted some of down_proj, .*v_proj"),
        (["q_proj", "mlp"], "'mlp', not a linear layer"),
        (["embed_tokens"], "tied embeddings"),
        (["lm_head"], "tied embeddings"),
        (["model.embed_tokens"], "tied embeddings"),
    ],
)
def test_targets_that_cannot_be_had(tiny: Path, targets: list[str], words: str) -> None:
    with pytest.raises(BadSetting, match=words) as error:
        attached(tiny, target_modules=targets)
    assert error.value.param == "target_modules"


def test_targets_by_name(tmp_path: Path, tiny: Path) -> None:
    model, _, _ = attached(tiny, target_modules=["v_proj", "q_proj"])
    assert {name.split(".")[-4] for name in models.trainable(model)} == {"q_proj", "v_proj"}
    base = make_model(tmp_path / "base", tied=False)
    model, request, start = attached(base, target_modules=["lm_head"], rank=4)
    shake(model)
    live = logits(model)
    save(model, request, start, base, tmp_path / "model")
    assert (logits(models.load_for_use(str(tmp_path / "model"), "float32").model) - live).abs().max() < 1e-4


def test_pissa_rank_over_the_width(tiny: Path) -> None:
    with pytest.raises(BadSetting, match="at most 16"):
        attached(tiny, "pissa", rank=17)


def test_weights_that_are_missing_or_broken(tiny: Path, tmp_path: Path) -> None:
    lacking = Path(shutil.copytree(tiny, tmp_path / "lacking"))
    state = load_file(lacking / "model.safetensors")
    del state["model.layers.1.mlp.up_proj.weight"]
    save_file(state, lacking / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BadSetting, match=r"lacks 1 weights of its architecture, model.layers.1.mlp.up_proj.weight"):
        models.load_base(lacking, "float32")
    broken = Path(shutil.copytree(tiny, tmp_path / "broken"))
    state = load_file(broken / "model.safetensors")
    state["model.norm.weight"][3] = float("inf")
    save_file(state, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BadSetting, match=r"model.norm.weight holds values that are not finite"):
        models.load_base(broken, "float32")
    cut = Path(shutil.copytree(tiny, tmp_path / "cut"))
    whole = (cut / "model.safetensors").read_bytes()
    (cut / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(BadSetting, match="cannot be loaded"):
        models.load_base(cut, "float32")


def test_a_run_folder_is_used_by_its_result(tiny: Path, adapter: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "request.json").write_text("{}")
    with pytest.raises(NotFound, match="no result yet"):
        models.load_for_use(str(run), "float32")
    shutil.copytree(adapter, run / "model")
    loaded = models.load_for_use(str(run), "float32")
    assert loaded.folder == run / "model"
    assert loaded.base_hash == catalogue.content_hash(tiny)
    assert not loaded.model.training
    assert not any(weight.requires_grad for weight in loaded.model.parameters())


def test_an_adapter_finds_its_base_again_by_name(adapter: Path, tiny: Path, copy: Path, tmp_path: Path) -> None:
    moved = Path(shutil.copytree(tiny, tmp_path / "moved"))
    note = json.loads((copy / "luthier.json").read_text())
    note["base"] |= {"folder": str(tmp_path / "gone"), "name": str(moved)}
    (copy / "luthier.json").write_text(json.dumps(note))
    assert models.load_for_use(str(copy), "float32").base_folder == moved
    note["base"]["name"] = str(tmp_path / "gone")
    (copy / "luthier.json").write_text(json.dumps(note))
    with pytest.raises(NotFound, match="is not here"):
        models.load_for_use(str(copy), "float32")


def test_another_base_is_refused(copy: Path, tmp_path: Path) -> None:
    other = make_model(tmp_path / "other", seed=1)  # same shapes, other weights
    note = json.loads((copy / "luthier.json").read_text())
    note["base"] |= {"folder": str(other), "name": str(other)}
    (copy / "luthier.json").write_text(json.dumps(note))
    with pytest.raises(BadSetting, match="trained on another base"):
        models.load_for_use(str(copy), "float32")
    (copy / "luthier.json").unlink()
    with pytest.raises(BadSetting, match="does not say which base"):
        models.load_for_use(str(copy), "float32")


def test_an_adapter_of_another_shape_is_refused_by_its_modules(tiny: Path, adapter: Path, tmp_path: Path) -> None:
    deeper = models.load_base(make_model(tmp_path / "deeper", layers=3), "float32")
    with pytest.raises(BadSetting, match="14 missing, 0 too many"):
        adapters.load(deeper, adapter)
    wider = models.load_base(make_model(tmp_path / "wider", hidden=64), "float32")
    with pytest.raises(BadSetting, match="does not fit its base"):
        adapters.load(wider, adapter)


@pytest.mark.parametrize(
    ("how", "words"),
    [
        (lambda state: {f"x.{key}": value for key, value in state.items()}, "matches no module of its base"),
        (lambda state: dict(list(state.items())[1:]), r"lacks .*lora_A.weight \(1 missing, 0 too many\)"),
        (lambda state: {**state, "extra.lora_A.weight": torch.ones(2, 2)}, "has no place for"),
        (lambda state: {}, "is empty"),
        (lambda state: {key: value * float("nan") for key, value in state.items()}, "not finite"),
    ],
)
def test_adapters_that_would_answer_as_the_base(
    copy: Path, how: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]], words: str
) -> None:
    change(copy, how)
    with pytest.raises(BadSetting, match=words):
        models.load_for_use(str(copy), "float32")


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"peft_type": "IA3"}, "found peft_type 'IA3', wanted LORA"),
        ({"modules_to_save": ["lm_head"]}, "uses modules_to_save"),
        ({"bias": "all"}, "uses bias"),
        ({"auto_map": {"AutoModel": "evil.Model"}}, "auto_map"),
        ({"megatron_config": {"a": 1}, "megatron_core": "evil"}, "uses megatron_config"),
        ({"r": 0}, "no usable LoRA configuration|does not fit"),
    ],
)
def test_adapter_configs_that_ask_for_more(copy: Path, values: dict[str, Any], words: str) -> None:
    change_config(copy, **values)
    with pytest.raises(BadSetting, match=words):
        models.load_for_use(str(copy), "float32")


def test_an_adapter_cannot_have_code_imported(copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    canary = tmp_path / "canary"
    (tmp_path / "evil_adapter_module.py").write_text(f"open({str(canary)!r}, 'w')")
    monkeypatch.syspath_prepend(str(tmp_path))
    change_config(
        copy,
        auto_mapping={"parent_library": "evil_adapter_module", "base_model_class": "X"},
        megatron_core="evil_adapter_module",
        trust_remote_code=True,
    )
    models.load_for_use(str(copy), "float32")
    assert not canary.exists()


def test_the_real_model_answers_and_takes_an_adapter(smollm2: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}], add_generation_prompt=True, tokenize=False
    )
    ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)["input_ids"]
    request = make_request({"model": str(smollm2), "data": ["x"], "rank": 8})
    base: Any = models.load_base(smollm2, "float32")
    with torch.no_grad():
        answer = base.generate(input_ids=ids, max_new_tokens=12, do_sample=False, use_cache=True)
    assert "Paris" in tokenizer.decode(answer[0, ids.shape[1] :])
    model = models.attach(base, request, settings())
    start = publish.fingerprint(models.trainable(model))
    assert len(start.hashes) == 30 * 7 * 2
    assert models.describe(model).startswith("2,442,240 of 136,957,248 weights learn (1.8 %)")
