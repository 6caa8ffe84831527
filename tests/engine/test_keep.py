"""A run at several scales: every figure measured again by another way, what is published, what stays, kills."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from luthier.data.formats import read_examples
from luthier.data.render import Renderer
from luthier.data.split import prompt_key
from luthier.engine import adapters, evaluate, forget, keep, models, prove
from luthier.engine.__main__ import carry_out, keep_general
from luthier.engine.meter import Meter
from luthier.proof import probe
from luthier.spec.keeping import ITEMS, Keeping
from luthier.spec.run import RunFolder
from tests.engine.runs import chats, events, lay_out, train, write

OPTIONS: dict[str, Any] = {
    "epochs": 4, "precision": "float32", "metric": "text", "learning_rate": 1e-2, "proof_rows": 50, "forgetting": 40,
}  # fmt: skip
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(autouse=True)
def _own_home(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LUTHIER_HOME", str(home))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("data")
    return write(folder / "train.jsonl", chats(16)), write(folder / "held.jsonl", chats(12, 4))


@pytest.fixture(scope="module")
def kept(
    tmp_path_factory: pytest.TempPathFactory, tiny: Path, files: tuple[Path, Path], home: Path
) -> tuple[RunFolder, Keeping]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LUTHIER_HOME", str(home))
        run = train(
            tmp_path_factory.mktemp("runs") / "kept", tiny, files[0], validation=str(files[1]), keep_general=True,
            **OPTIONS,
        )  # fmt: skip
    return run, told(run)


def told(run: RunFolder) -> Keeping:
    found = json.loads(run.report.read_text())["keeping"]
    assert found is not None, events(run, "warning")
    return Keeping.model_validate(found)


def by_hand(tiny: Path, folder: Path, scale: float) -> Any:
    """The base with scale x (alpha / r) B A added to its weights, by plain arithmetic."""
    model = models.load_base(tiny, "float32").eval()
    config, state = json.loads((folder / "adapter_config.json").read_text()), load_file(folder / WEIGHTS)
    weights = dict(model.named_parameters())
    with torch.no_grad():
        for key in [key for key in state if ".lora_A." in key]:
            path = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            change = state[key.replace("lora_A", "lora_B")] @ state[key] * (config["lora_alpha"] / config["r"])
            weights[f"{path}.weight"].add_(scale * change)
    return model


def test_every_point_is_measured_again_by_hand(
    kept: tuple[RunFolder, Keeping], tiny: Path, files: tuple[Path, Path]
) -> None:
    run, found = kept
    whole = run.model.with_name("model.scale-1")
    source = whole if whole.is_dir() else run.model
    assert [point.scale for point in found.points] == [0.0, 0.25, 0.5, 0.75, 1.0]
    renderer = Renderer.load(run.model)
    asked = {row["prompt"] for row in json.loads(run.report.read_text())["proof"]["rows"]}
    every = [item for item in read_examples(files[1]) if hasattr(item, "messages")]
    chose = [item for item in every if item.messages[0].content not in asked]
    assert len(chose) == found.rows == 6 and len(asked) == 6
    assert not {prompt_key(item) for item in chose} & {prompt_key(item) for item in every if item not in chose}
    items = probe.sample(probe.half(probe.general(), 0), ITEMS)
    assert found.items == len(items)
    base = forget.measure(by_hand(tiny, source, 0.0), renderer, items)
    for point in found.points:
        model = by_hand(tiny, source, point.scale)
        loaded = models.Loaded(model, run.model, tiny, "", False, "by hand")
        report = evaluate.evaluate(loaded, renderer, chose, compare=False, plan=prove.Plan("text"))
        assert report.tuned is not None and report.proof is not None
        assert point.loss == pytest.approx(report.tuned.loss, rel=1e-4)
        assert point.score == pytest.approx(np.mean([row.scores["tuned"] for row in report.proof.rows]), abs=0.02)
        after = forget.measure(model, renderer, items)
        parts: dict[tuple[str, str], list[str]] = {}
        for item in items:
            parts.setdefault(item.part, []).append(item.id)
        texts = [
            1 - np.exp(np.mean([base[i] - after[i] for i in ids])) for (kind, _), ids in parts.items() if kind == "text"
        ]
        assert point.forgetting is not None and len(texts) == 2
        if all(kind == "text" for kind, _ in _counted(items, base)):
            assert point.forgetting == pytest.approx(np.mean(texts), abs=1e-3)
    assert found.points[0].forgetting == pytest.approx(0.0, abs=1e-9)


def _counted(items: list[probe.Item], base: dict[str, float]) -> list[tuple[str, str]]:
    """Parts on which the base is better than chance, by scipy's interval."""
    from scipy.stats import binomtest

    found = []
    for part in {item.part for item in items}:
        members = [item for item in items if item.part == part]
        if members[0].form == "text":
            found.append(part)
            continue
        share = sum(base[item.id] for item in members) / len(members)
        low = binomtest(round(share * len(members)), len(members)).proportion_ci(method="wilson").low
        if low > max(np.mean([item.chance or 0.0 for item in members]), 0.02):
            found.append(part)
    return found


def test_what_is_published_is_the_chosen_scale(kept: tuple[RunFolder, Keeping], tiny: Path) -> None:
    run, found = kept
    answered = models.load_for_use(str(run.path), "float32")
    whole = run.model.with_name("model.scale-1")
    source = whole if whole.is_dir() else run.model
    ids = torch.tensor([[5, 9, 2, 40, 7]])
    with torch.no_grad():
        wanted = by_hand(tiny, source, found.chosen)(ids).logits
        assert torch.allclose(answered.model(ids).logits, wanted, atol=1e-4)
    assert (found.chosen == 1.0) == (not whole.exists()) == (found.old is None)


def test_halves_of_the_probe_share_nothing() -> None:
    items = probe.general()
    first, second = (probe.half(items, which) for which in (0, 1))
    assert not {item.id for item in first} & {item.id for item in second}
    assert sorted(item.id for item in [*first, *second]) == sorted(item.id for item in items)
    for part in {item.part for item in items}:
        counts = [sum(item.part == part for item in half) for half in (first, second)]
        assert abs(counts[0] - counts[1]) <= 1


def test_a_run_that_is_over_is_scaled_and_scaled_back(
    tmp_path: Path, tiny: Path, files: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The adapter's weights keep their bytes; the alpha changes; another search begins from scale 1 again."""
    run = train(tmp_path / "run", tiny, files[0], validation=str(files[1]), **OPTIONS)
    before = (run.model / WEIGHTS).read_bytes()
    alpha = json.loads((run.model / "adapter_config.json").read_text())["lora_alpha"]
    asked = {"scales": [0.5, 1.0], "by": "loss", "share": 0.0, "items": 20, "rows": 50}
    monkeypatch.setattr(keep.tradeoff, "decide", chooses(0.5))
    assert keep_general(run, asked) == 0
    found = told(run)
    assert found.chosen == 0.5 and found.old == str(run.model.with_name("model.scale-1"))
    assert (run.model / WEIGHTS).read_bytes() == before == (Path(found.old) / WEIGHTS).read_bytes()
    assert json.loads((run.model / "adapter_config.json").read_text())["lora_alpha"] == alpha / 2
    assert json.loads((run.model / adapters.NOTE).read_text())["scale"] == 0.5
    assert events(run)[-1]["status"] == "succeeded" and run.page.read_text().count("What was kept") == 1
    first = json.loads(run.report.read_text())["proof"]
    assert keep_general(run, {**asked, "scales": [0.25, 0.5]}) == 0
    assert [point.model_dump() for point in told(run).points][2:] == [point.model_dump() for point in found.points][
        1:
    ]  # measured from scale 1 both times
    assert json.loads(run.report.read_text())["proof"]["rows"] == first["rows"]
    monkeypatch.setattr(keep.tradeoff, "decide", chooses(1.0))
    assert keep_general(run, asked) == 0
    assert json.loads((run.model / "adapter_config.json").read_text())["lora_alpha"] == alpha
    assert "scale" not in json.loads((run.model / adapters.NOTE).read_text())
    assert sorted(path.name for path in run.path.iterdir() if "work" in path.name) == []


def chooses(scale: float) -> Any:
    def decide(found: Keeping, share: float, most: float | None) -> None:
        found.chosen, found.rule, found.sentence = scale, "by the test", "said"

    return decide


@pytest.mark.parametrize("method", ["full", "freeze:1", "pissa", "rslora"])
def test_every_method_that_can_be_scaled(
    tmp_path: Path, tiny: Path, files: tuple[Path, Path], method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At half scale each weight lies in the middle between base and tuned: for full models in the file itself."""
    monkeypatch.setattr(keep.tradeoff, "decide", chooses(0.5))
    options = {**OPTIONS, "learning_rate": 1e-3, "epochs": 1}
    run = train(tmp_path / "run", tiny, files[0], validation=str(files[1]), method=method, keep_general=True, **options)
    whole = run.model.with_name("model.scale-1")
    assert told(run).chosen == 0.5
    base, tuned, half = (models.load_for_use(str(place), "float32").model for place in (tiny, whole, run.model))
    if method in ("full", "freeze:1"):
        assert told(run).method == "interpolated weights"
        start, end, middle = (dict(each.named_parameters()) for each in (base, tuned, half))
        assert all(torch.allclose(middle[name], (start[name] + end[name]) / 2, atol=1e-6) for name in start)
        assert any(not torch.equal(start[name], end[name]) for name in start)
    else:
        merged = [each.merge_and_unload() for each in (tuned, half)]
        start, end, middle = (dict(each.named_parameters()) for each in (base, *merged))
        assert all(torch.allclose(middle[name], (start[name] + end[name]) / 2, atol=1e-5) for name in start)


def test_killed_after_the_scale_was_published_a_run_ends_the_same(
    tmp_path: Path, tiny: Path, files: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keep.tradeoff, "decide", chooses(0.5))
    run = lay_out(tmp_path / "run", tiny, files[0], validation=str(files[1]), keep_general=True, **OPTIONS)
    with monkeypatch.context() as patched:
        patched.setattr(Meter, "conclude", lambda *_: 1 / 0)
        assert carry_out(run) == 1
    alpha = json.loads((run.model / "adapter_config.json").read_text())["lora_alpha"]
    assert carry_out(run) == 0
    assert told(run).chosen == 0.5
    assert json.loads((run.model / "adapter_config.json").read_text())["lora_alpha"] == alpha == 16.0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"keep_general": True}, "give --validation"),
        ({"keep_general": True, "validation": "0.5", "proof_rows": 0}, "give --validation"),
        ({"keep_general": True, "validation": "0.5", "forgetting": "off"}, "give --validation"),
        ({"keep_general": True, "validation": "0.5", "method": "dora"}, "dora"),
    ],
)
def test_what_cannot_be_chosen_is_refused(tmp_path: Path, tiny: Path, options: dict[str, Any], words: str) -> None:
    from luthier.spec.errors import BadSetting
    from luthier.spec.job import make_request

    with pytest.raises(BadSetting, match=words):
        make_request({"model": str(tiny), "data": ["x"], **options})


def test_a_run_without_held_out_rows_is_refused(tmp_path: Path, tiny: Path, files: tuple[Path, Path]) -> None:
    run = train(tmp_path / "run", tiny, files[0], max_steps=2, precision="float32")
    asked = {"scales": [0.5], "by": "loss", "share": 0.9, "items": 20, "rows": 50}
    assert keep_general(run, asked) == 2
    assert "holds no rows out" in events(run)[-1]["message"]
    empty = lay_out(tmp_path / "empty", tiny, files[0])
    assert keep_general(empty, asked) == 2
    assert "no result yet" in events(empty)[-1]["message"]
