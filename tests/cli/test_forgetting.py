"""`luthier forgetting`, each option end to end on the tiny model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from luthier.engine import forget, models
from luthier.spec.forgetting import Forgetting
from tests.cli.calling import Run, caller


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny: Path) -> Run:
    """The command, with models `tuned` (an adapter on tiny), `tiny` and `full` (its base is not known)."""
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setenv("LUTHIER_HOME", str(tmp_path / "home"))

    def load(name: str, precision: Any, *_: Any) -> models.Loaded:
        model: Any = models.load_base(tiny, precision).eval()
        if name == "tuned":
            torch.manual_seed(0)
            config = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "up_proj"])
            model = get_peft_model(model, config).eval()
            for key, weight in model.named_parameters():
                if "lora_B" in key:
                    weight.data.fill_(0.5)
        return models.Loaded(model.requires_grad_(False), tiny, tiny, "content", name == "tuned", name)

    monkeypatch.setattr(models, "load_for_use", load)

    return caller("forgetting", capsys)


@pytest.fixture
def suite(tmp_path: Path) -> Path:
    folder = tmp_path / "suites"
    folder.mkdir()
    lines = [{"query": f"the {n} is", "choices": ["fox", "dog", "two"], "gold": n % 3} for n in range(12)]
    (folder / "mine.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "more.jsonl").write_text('{"context": "one two", "continuation": "three"}\n')
    return folder


def report(out: str) -> Forgetting:
    found = json.loads(out)
    verdict = found.pop("verdict")
    told = Forgetting(**found)
    assert told.verdict == verdict
    return told


def test_suites_of_ones_own_in_place_of_ours(run: Run, suite: Path) -> None:
    code, out, _ = run("tuned", "--probe", suite, "--precision", "float32", "--json")
    assert code == 0
    assert [(part.kind, part.items) for part in report(out).parts] == [("mine", 12), ("more", 1)]
    code, out, _ = run("tuned", "--probe", suite / "more.jsonl", "--json")
    assert [part.kind for part in report(out).parts] == ["more"]


def test_a_sample_of_ours_as_a_table(run: Run) -> None:
    code, out, _ = run("tuned", "--sample", "1")
    assert code == 0
    for words in ("knowledge (en)", "knowledge (zh)", "text (en)", "perplexity", "95% interval"):
        assert words in out


def test_a_model_beside_itself_lost_nothing(run: Run, suite: Path) -> None:
    code, out, _ = run("tiny", "--base", "tiny", "--probe", suite, "--json")
    found = report(out)
    assert (code, found.before) == (0, "tiny")
    assert all(part.loss == 0 for part in found.parts)


def test_the_bases_scores_are_remembered(run: Run, suite: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = run("tuned", "--probe", suite, "--json")
    asked: list[str] = []
    real = forget.measure

    def spy(*given: Any, **more: Any) -> dict[str, float]:
        asked.append(more["name"])
        return real(*given, **more)

    monkeypatch.setattr(forget, "measure", spy)
    assert run("tuned", "--probe", suite, "--json")[1] == first[1]
    assert asked == ["after"]
    run("tuned", "--probe", suite, "--template", "plain", "--json")
    assert asked == ["after", "before", "after"]


def test_without_a_base_it_says_what_to_name(run: Run) -> None:
    code, _, err = run("tiny")
    assert code == 2
    assert "does not say which base" in err and "--base MODEL" in err


def test_a_suite_that_is_not_there(run: Run, tmp_path: Path) -> None:
    code, _, err = run("tuned", "--probe", tmp_path / "nowhere")
    assert code == 2
    assert "--probe: no *.jsonl" in err
