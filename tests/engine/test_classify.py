"""Classification metrics: the columns by hand, the predictions by the model's own forward, and what is refused."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from luthier.data.dataset import prepare
from luthier.data.render import Renderer
from luthier.engine import models
from luthier.engine.classify import columns
from luthier.spec.errors import BadSetting
from luthier.spec.job import make_request
from tests.engine.runs import chats, events, lay_out, process, refused, train, write

PLAIN: dict[str, Any] = {"precision": "float32", "epochs": 1, "warmup": 0.0, "learning_rate": 5e-3}
TWO = (" dog", " fox")
THREE = (" dog", " fox", " answer")


def pairs(path: Path, classes: tuple[str, ...], count: int = 12, start: int = 0) -> Path:
    return write(
        path,
        [
            {"prompt": f"is number {n} fine? ->", "completion": classes[n % len(classes)]}
            for n in range(start, start + count)
        ],
    )


# --- columns --------------------------------------------------------------------------------------------------------


def test_two_classes_by_hand() -> None:
    """Chances of the positive class .9 .6 .4 .2 .5; it is the truth of the first, third and last."""
    chance = np.array([0.9, 0.6, 0.4, 0.2, 0.5])
    truth = np.array([1, 0, 1, 0, 1])
    scores = np.log(np.stack([1 - chance, chance], axis=1)) + np.arange(5)[:, None]  # a constant a row is no matter
    found = columns(truth, scores, 1, [1.0, 2])
    assert list(found) == [
        "classification/accuracy",
        "classification/precision",
        "classification/recall",
        "classification/auroc",
        "classification/auprc",
        "classification/f1.0",
        "classification/f2.0",
    ]
    assert found["classification/accuracy"] == 3 / 5  # .5 counts as positive
    assert found["classification/precision"] == pytest.approx(2 / 3)
    assert found["classification/recall"] == pytest.approx(2 / 3)
    assert found["classification/auroc"] == pytest.approx(
        4 / 6
    )  # pairs in order: .9 beats two, .4 and .5 beat one each
    assert found["classification/auprc"] == pytest.approx((1 + 2 / 3 + 3 / 4) / 3)
    assert found["classification/f1.0"] == pytest.approx(2 / 3)
    assert found["classification/f2.0"] == pytest.approx(2 / 3)


def test_undefined_values_are_none() -> None:
    chance = np.array([0.1, 0.2])
    scores = np.log(np.stack([chance, 1 - chance], axis=1))
    found = columns(np.array([1, 1]), scores, 0, [0.5])
    assert found == {
        "classification/accuracy": 1.0,
        "classification/precision": None,
        "classification/recall": None,
        "classification/auroc": None,
        "classification/auprc": None,
        "classification/f0.5": None,
    }
    never = columns(np.array([0, 1]), scores, 0, [1.0])  # never predicted: no precision, but a recall of 0
    assert never["classification/precision"] is None and never["classification/recall"] == 0.0
    assert never["classification/auroc"] == 0.0


def test_several_classes_by_hand() -> None:
    truth, guess = np.array([0, 0, 1, 2]), np.array([0, 1, 1, 1])
    found = columns(truth, np.eye(3)[guess], None, [1.0])
    first, second = 2 * 1 * 0.5 / 1.5, 2 * (1 / 3) / (4 / 3)
    assert found == {
        "classification/accuracy": 0.5,
        "classification/weighted_f1_score": pytest.approx((2 * first + second + 0) / 4),
    }


# --- predictions ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def whole_scores(model: Any, prompt: list[int], answers: list[list[int]]) -> list[float]:
    """Log-probabilities of answers by the model's own forward."""
    found = []
    for answer in answers:
        ids = torch.tensor([[*prompt, *answer]])
        said = model(input_ids=ids).logits[0].float().log_softmax(-1)
        found.append(float(sum(said[len(prompt) - 1 + n, token] for n, token in enumerate(answer))))
    return found


@pytest.mark.parametrize(
    ("classes", "positive", "shared"),
    [
        (TWO, " fox", False),
        (THREE, None, False),
        ((" one", " one two"), " one", True),
        ((" 1 2", " 1 3", " 1 4"), None, True),
    ],
)
def test_predictions_are_those_of_the_plain_forward(
    tmp_path: Path, tiny: Path, classes: tuple[str, ...], positive: str | None, shared: bool
) -> None:
    data, held = pairs(tmp_path / "train.jsonl", classes), pairs(tmp_path / "held.jsonl", classes, 20, 50)
    options: dict[str, Any] = {"classification_n_classes": len(classes), "classification_positive_class": positive}
    run = train(tmp_path / "run", tiny, data, validation=str(held), micro_tokens=90, **PLAIN, **options)
    warned = [event["message"] for event in events(run, "warning") if "begin with the same token" in event["message"]]
    assert len(warned) == shared and (not shared or repr(classes[0]) in warned[0])

    renderer = Renderer.load(tiny)
    names = sorted(classes, key=lambda name: [*renderer.tokenizer.plain(name), *renderer.stop_ids[:1]])
    answers = [[*renderer.tokenizer.plain(name), renderer.stop_ids[0]] for name in names]
    asked = [list(ids[: int(np.argmax(marks > 0))]) for ids, marks in prepare([held], renderer, max_length=512).rows]
    truth = np.array([names.index(classes[n % len(classes)]) for n in range(50, 70)])
    for event, folder in zip(events(run, "validation"), (tiny, run.model), strict=True):
        model = models.load_for_use(str(folder), "float32").model
        scored = answers if shared else [answer[:1] for answer in answers]
        scores = np.array([whole_scores(model, [int(token) for token in prompt], scored) for prompt in asked])
        wanted = columns(truth, scores, None if positive is None else names.index(positive), [1.0])
        assert event["classification"] == pytest.approx(wanted)


def test_a_share_of_the_rows_and_weighted_prompts(tmp_path: Path, tiny: Path) -> None:
    data = pairs(tmp_path / "train.jsonl", TWO, 40)
    options: dict[str, Any] = {"classification_positive_class": " dog", "validation": "0.25"}
    run = train(tmp_path / "run", tiny, data, **PLAIN, **options)
    other = train(tmp_path / "other", tiny, data, **PLAIN, **options, prompt_loss_weight=1.0)
    first, second = (events(each, "validation") for each in (run, other))
    assert first[0] | {"time": 0} == second[0] | {"time": 0}  # the base is measured alike, however training weighs
    assert first[1]["loss"] != second[1]["loss"]
    assert math.isfinite(first[1]["classification"]["classification/auprc"])


def test_ranks_measure_together(tmp_path: Path, tiny: Path) -> None:
    data, held = pairs(tmp_path / "train.jsonl", TWO), pairs(tmp_path / "held.jsonl", TWO, 9, 50)
    options: dict[str, Any] = {
        **PLAIN, "classification_positive_class": " dog", "validation": str(held), "micro_tokens": 60, "max_steps": 1,
    }  # fmt: skip
    one = train(tmp_path / "one", tiny, data, **options)
    two = lay_out(tmp_path / "two", tiny, data, **options)
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    assert process(two, *launcher).wait(180) == 0, two.log.read_text()
    for mine, theirs in zip(events(one, "validation"), events(two, "validation"), strict=True):
        assert mine["classification"] == pytest.approx(theirs["classification"])
        assert mine["sequence_accuracy"] == theirs["sequence_accuracy"]
    mine, theirs = events(one, "step")[0], events(two, "step")[0]
    assert mine["token_accuracy"] == theirs["token_accuracy"]


# --- refusals -------------------------------------------------------------------------------------------------------


def test_rows_that_are_no_such_classes(tmp_path: Path, tiny: Path) -> None:
    data = pairs(tmp_path / "train.jsonl", THREE)
    shown = {"validation": "0.5"}
    failed = refused(tmp_path / "a", tiny, data, classification_n_classes=4, **shown)
    assert failed["code"] == "invalid_data" and failed["param"] == "classification_n_classes"
    assert "3 classes, wanted 4" in failed["message"] and "' answer'" in failed["message"]
    failed = refused(tmp_path / "b", tiny, data, classification_positive_class=" dog", **shown)
    assert "3 classes, wanted 2" in failed["message"]
    two = pairs(tmp_path / "two.jsonl", TWO)
    failed = refused(tmp_path / "c", tiny, two, classification_positive_class="dog", **shown)
    assert failed["param"] == "classification_positive_class" and "' dog', ' fox'" in failed["message"]
    talk = write(tmp_path / "chats.jsonl", chats(8))
    failed = refused(tmp_path / "d", tiny, talk, classification_n_classes=2, **shown)
    assert failed["code"] == "invalid_data" and "chats" in failed["message"]


@pytest.mark.parametrize(
    "options",
    [
        {"classification_n_classes": 2},
        {"classification_positive_class": " dog"},
        {"classification_positive_class": " dog", "classification_n_classes": 3, "validation": "0.1"},
        {"classification_betas": [1.0], "validation": "0.1"},
        {"classification_n_classes": 1, "validation": "0.1"},
        {"classification_positive_class": " dog", "classification_betas": [0.0], "validation": "0.1"},
    ],
)
def test_options_that_make_no_sense(options: dict[str, Any]) -> None:
    with pytest.raises(BadSetting):
        make_request({"model": "m", "data": ["d"], **options})
