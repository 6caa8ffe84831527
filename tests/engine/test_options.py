"""Every field of TrainRequest does something that can be seen from outside, and a table here says what.

An option that nothing reads is worse than none. `test_no_option_is_without_a_test` holds the table and the fields
together.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from luthier.data.template import BUILT_IN
from luthier.spec.job import TrainRequest, apply_recipe
from luthier.spec.run import RunFolder
from tests.engine.runs import chats, events, losses, preferences, train, weights, write

Look = Callable[[RunFolder, RunFolder], None]  # (run with the option, run without)


def rates(run: RunFolder) -> list[float]:
    return [event["learning_rate"] for event in events(run, "step")]


def settings(run: RunFolder) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(run.spec.read_text())["settings"]
    return found


def adapter(run: RunFolder) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run.model / "adapter_config.json").read_text())
    return found


def differs(run: RunFolder, plain: RunFolder) -> bool:
    mine, theirs = weights(run), weights(plain)
    return any(not torch.equal(mine[name], theirs[name]) for name in mine)


def supervised(run: RunFolder) -> list[int]:
    return [event["supervised_tokens"] for event in events(run, "step")]


def is_true(value: object) -> None:
    assert value


TABLE: dict[str, tuple[dict[str, Any], Look]] = {
    "method": ({"method": "full"}, lambda run, _: is_true("model.norm.weight" in weights(run))),
    "template": (
        {"template": "plain"},
        lambda run, _: is_true((run.model / "chat_template.jinja").read_text() == BUILT_IN["plain"]),
    ),
    "epochs": ({"epochs": 3}, lambda run, plain: is_true(len(losses(run)) == 3 * len(losses(plain)))),
    "max_steps": ({"max_steps": 2}, lambda run, plain: is_true(len(losses(run)) == 2 < len(losses(plain)))),
    "batch_size": ({"batch_size": 2}, lambda run, plain: is_true(len(losses(run)) == 2 * len(losses(plain)))),
    "learning_rate": ({"learning_rate": 5e-4}, lambda run, _: is_true(max(rates(run)) == 5e-4)),
    "learning_rate_multiplier": (
        {"learning_rate_multiplier": 0.5},
        lambda run, plain: is_true(rates(run) == [rate / 2 for rate in rates(plain)]),
    ),
    "schedule": (
        {"schedule": "constant"},
        lambda run, plain: is_true(rates(run)[-1] == max(rates(run)) > rates(plain)[-1]),
    ),
    "warmup": ({"warmup": 0.7}, lambda run, plain: is_true(rates(run)[0] < rates(plain)[0])),
    "weight_decay": ({"weight_decay": 0.5}, lambda run, plain: is_true(differs(run, plain))),
    "max_grad_norm": ({"max_grad_norm": 1e-9}, lambda run, plain: is_true(differs(run, plain))),
    "label_smoothing": ({"label_smoothing": 0.2}, lambda run, plain: is_true(losses(run)[0] != losses(plain)[0])),
    "rank": ({"rank": 3}, lambda run, _: is_true({min(each.shape) for each in weights(run).values()} == {3})),
    "alpha": ({"alpha": 5.0}, lambda run, _: is_true(adapter(run)["lora_alpha"] == 5.0)),
    "dropout": ({"dropout": 0.3}, lambda run, plain: is_true(losses(run)[-1] != losses(plain)[-1])),
    "target_modules": (
        {"target_modules": ["q_proj"]},
        lambda run, plain: is_true(
            all("q_proj" in name for name in weights(run)) and len(weights(run)) < len(weights(plain))
        ),
    ),
    "seed": ({"seed": 8}, lambda run, plain: is_true(differs(run, plain))),
    "max_length": ({"max_length": 77}, lambda run, _: is_true(settings(run)["max_length"] == 77)),
    "overlong": (
        {"overlong": "drop", "max_length": 40},
        lambda run, _: is_true(events(run, "prepared")[0]["dropped"] > 0),
    ),
    "precision": ({"precision": "bfloat16"}, lambda run, plain: is_true(losses(run)[0] != losses(plain)[0])),
    "micro_tokens": ({"micro_tokens": 40}, lambda run, _: is_true(settings(run)["micro_tokens"] == 40)),
    "checkpoint_every": (
        {"checkpoint_every": 1},
        lambda run, plain: is_true(len(events(run, "checkpoint")) == 3 > len(events(plain, "checkpoint"))),
    ),
    "validate_every": (
        {"validate_every": 1, "validation": "0.2", "batch_size": 2},
        lambda run, _: is_true([event["step"] for event in events(run, "validation")] == [0, 1, 2, 3, 4, 5]),
    ),
    "validation": (
        {"validation": "0.2"},
        lambda run, _: is_true(json.loads(run.report.read_text())["base"]["rows"] == 2),
    ),
    "metric": (
        {"metric": "text", "validation": "0.2"},
        lambda run, _: is_true(json.loads(run.report.read_text())["proof"]["metric"] == "text"),
    ),
    "proof_rows": (
        {"proof_rows": 1, "validation": "0.2"},
        lambda run, _: is_true(len(json.loads(run.report.read_text())["proof"]["rows"]) == 1),
    ),
    "proof_data": (
        {"proof_data": "PAIRS", "validation": "0.2", "metric": "exact_match"},
        lambda run, _: is_true(
            all(row["prompt"].startswith("is it ") for row in json.loads(run.report.read_text())["proof"]["rows"])
        ),
    ),
    "keep_general": (
        {"keep_general": True, "validation": "0.5", "metric": "text"},
        lambda run, plain: is_true(
            [json.loads(one.report.read_text())["keeping"] is None for one in (run, plain)] == [False, True]
        ),
    ),
    "forgetting": (
        {"forgetting": 1},
        lambda run, plain: is_true(
            [json.loads(one.report.read_text())["forgetting"] is None for one in (run, plain)] == [False, True]
        ),
    ),
    "replay": (
        {"replay": 0.5, "replay_data": "PAIRS"},
        lambda run, plain: is_true(
            json.loads(run.report.read_text())["replayed_rows"] == events(run, "prepared")[0]["train_rows"] / 3
        ),
    ),
    "replay_data": (
        {"replay": 0.1, "replay_data": "PAIRS"},
        lambda run, plain: is_true(
            len({json.loads(one.spec.read_text())["data"]["rows"] for one in (run, plain)}) == 2
        ),
    ),
    "must_improve": (
        {"must_improve": 1e9, "validation": "0.2"},
        lambda run, _: is_true(json.loads(run.report.read_text())["gate"]["passed"] is False),
    ),
    "max_forgetting": (
        {"max_forgetting": 1.0, "forgetting": 1},
        lambda run, _: is_true(json.loads(run.report.read_text())["gate"]["passed"] is True),
    ),
    "proof_memory": (
        {"proof_memory": "run", "validation": "0.2"},
        lambda run, plain: is_true(len(list(run.answers.glob("*.jsonl"))) == 2 and not plain.answers.exists()),
    ),
    "proof_examples": (
        {"proof_examples": 0, "validation": "0.2"},
        lambda run, _: is_true(
            [way["name"] for way in json.loads(run.report.read_text())["proof"]["ways"]] == ["base", "tuned"]
        ),
    ),
    "continue_from": (
        {"continue_from": "PARENT"},
        lambda run, plain: is_true(losses(run)[0] < losses(plain)[0] and weights(run).keys() == weights(plain).keys()),
    ),
    "prompt_loss_weight": (
        {"prompt_loss_weight": 0.5, "data": "PAIRS"},
        lambda run, plain: is_true(supervised(run) == supervised(plain) and losses(run)[0] != losses(plain)[0]),
    ),
    "objective": (
        {"objective": "dpo", "data": "PREFERENCES"},
        lambda run, plain: is_true(abs(losses(run)[0] - math.log(2)) < 1e-4 and losses(plain)[0] > 2),
    ),
    "beta": (
        {"objective": "dpo", "data": "PREFERENCES", "beta": 0.5},
        lambda run, _: is_true(settings(run)["beta"] == 0.5 and losses(run)[-1] < losses(run)[0]),
    ),
    "publish_checkpoints": (
        {"publish_checkpoints": 2, "checkpoint_every": 1},
        lambda run, _: is_true(
            sorted(path.name for path in run.published.iterdir()) == ["step-00000002", "step-00000003"]
        ),
    ),
    "classification_n_classes": (
        {"classification_n_classes": 3, "data": "PAIRS", "validation": "0.2"},
        lambda run, _: is_true(
            events(run, "validation")[0]["classification"].keys()
            == {"classification/accuracy", "classification/weighted_f1_score"}
        ),
    ),
    "classification_positive_class": (
        {"classification_positive_class": " yes", "data": "TWO", "validation": "0.2"},
        lambda run, _: is_true("classification/f1.0" in events(run, "validation")[0]["classification"]),
    ),
    "classification_betas": (
        {
            "classification_positive_class": " yes",
            "classification_betas": [0.5, 2],
            "data": "TWO",
            "validation": "0.2",
        },
        lambda run, _: is_true(
            {"classification/f0.5", "classification/f2.0"} <= events(run, "validation")[0]["classification"].keys()
        ),
    ),
    "recipe": (
        apply_recipe({"recipe": "self-llm"}),
        lambda run, _: is_true(
            adapter(run)["r"] == 8 and settings(run)["max_length"] == 384 and max(rates(run)) == 1e-4
        ),
    ),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = chats(12)
    rows[3]["messages"][1]["content"] = "a longer answer than the others have"
    return write(tmp_path_factory.mktemp("data") / "train.jsonl", rows)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory, tiny: Path, data: Path) -> RunFolder:
    return train(tmp_path_factory.mktemp("plain") / "run", tiny, data, epochs=1, precision="float32", warmup=0.0)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Prompt/completion rows of three and of two classes, and preference pairs."""
    folder = tmp_path_factory.mktemp("pairs")
    made = {"PREFERENCES": write(folder / "preferences.jsonl", preferences(12))}
    answers = {"PAIRS": (" yes", " no", " maybe"), "TWO": (" yes", " no")}
    return made | {
        name: write(
            folder / f"{name}.jsonl",
            [{"prompt": f"is it {n}? ->", "completion": words[n % len(words)]} for n in range(12)],
        )
        for name, words in answers.items()
    }


@pytest.mark.parametrize("option", list(TABLE))
def test_option(tmp_path: Path, tiny: Path, data: Path, plain: RunFolder, pairs: dict[str, Path], option: str) -> None:
    given, look = TABLE[option]
    options = {"epochs": 1, "precision": "float32", "warmup": 0.0, **given}
    if "data" in options:
        data = pairs[options.pop("data")]
    for name in {"replay_data", "proof_data"} & options.keys():
        options[name] = str(pairs[options[name]])
    if option == "continue_from":
        options["continue_from"] = str(plain.path)
    if option == "prompt_loss_weight":
        same = {name: value for name, value in options.items() if name != option}
        plain = train(tmp_path / "plain", tiny, data, **same)
    run = train(tmp_path / "run", tiny, data, **options)
    look(run, plain)


def test_no_option_is_without_a_test() -> None:
    assert set(TABLE) | {"model", "data"} == set(TrainRequest.model_fields)
