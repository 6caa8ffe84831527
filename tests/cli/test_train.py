"""`luthier train`: options are the request's fields; then a real engine, stopped, killed and resumed."""

from __future__ import annotations

import importlib
import inspect
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from luthier import cli
from luthier.spec.job import RECIPES, TrainRequest
from luthier.spec.run import RunFolder

ROOT = Path(__file__).parents[2]
command = importlib.import_module("luthier.cli.train")  # in the package, `train` is the function
SAME = ("--validation", "0.2", "--epochs", "16", "--seed", "7")
WEIGHTS = "adapter_model.safetensors"
OWN = {"out", "resume", "processes", "as_json"}


def called(*words: str | Path) -> int:
    with pytest.raises(SystemExit) as leaving:
        cli.main([str(word) for word in words])
    return int(leaving.value.code or 0)


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "tickets.jsonl"
    rows = [
        {"messages": [{"role": "user", "content": f"ticket {n}: {n * 7}"}, {"role": "assistant", "content": answer}]}
        for n, answer in enumerate(("billing", "shipping", "refund") * 10)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


# -- options to a request ----------------------------------------------------------------------------------------------


@pytest.fixture
def asked(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny: Path
) -> Iterator[list[tuple[RunFolder, dict[str, Any], int]]]:
    """What would be started; nothing is. The working directory is a folder with a model `base` and a file `a.jsonl`."""
    started: list[tuple[RunFolder, dict[str, Any], int]] = []

    def note(run: RunFolder, request: dict[str, Any], processes: int, as_json: bool) -> int:
        started.append((run, request, processes))
        return 0

    monkeypatch.setattr(command, "_carry_out", note)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base").symlink_to(tiny)
    (tmp_path / "a.jsonl").write_text("{}\n")
    return started


def test_options_and_fields_are_the_same_set() -> None:
    assert set(inspect.signature(command.train).parameters) == set(TrainRequest.model_fields) | OWN


def test_every_option_helps_with_the_fields_description(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    assert called("train", "--help") == 0
    told = capsys.readouterr().out
    for name, field in TrainRequest.model_fields.items():
        assert re.search(rf"--{name.replace('_', '-')}\b", told), name
        assert field.description is not None
        assert field.description.replace("`", "") in told, name


def test_only_what_was_given_is_asked(asked: list[Any], tmp_path: Path) -> None:
    assert called("train", "--model", "base", "--data", "a.jsonl", "--out", "r") == 0
    ((run, request, processes),) = asked
    assert run.path == tmp_path / "r"
    assert request == {"model": str(tmp_path / "base"), "data": [str(tmp_path / "a.jsonl")]}
    assert json.loads(run.request.read_text()) == request
    assert processes == 1


def test_values_have_their_types(asked: list[Any], tmp_path: Path) -> None:
    words = {
        "--epochs": "3", "--batch-size": "auto", "--learning-rate": "1e-4", "--max-steps": "7", "--alpha": "32",
        "--checkpoint-every": "5", "--validate-every": "epoch", "--validation": "0.1", "--seed": "0",
        "--target-modules": "q_proj, v_proj", "--max-length": "128", "--overlong": "drop", "--warmup": "0",
        "--processes": "2", "--classification-positive-class": " yes", "--classification-betas": "0.5, 2",
        "--prompt-loss-weight": "0.1", "--learning-rate-multiplier": "2", "--publish-checkpoints": "3",
    }  # fmt: skip
    flat = [word for pair in words.items() for word in pair]
    assert called("train", "--model", "base", "--data", "a.jsonl", "--data", "a.jsonl", "--out", "r", *flat) == 0
    ((_, request, processes),) = asked
    assert processes == 2
    assert {name: value for name, value in request.items() if name not in ("model", "data")} == {
        "epochs": 3, "batch_size": "auto", "learning_rate": 1e-4, "max_steps": 7, "alpha": 32.0, "checkpoint_every": 5,
        "validate_every": "epoch", "validation": "0.1", "target_modules": ["q_proj", "v_proj"], "seed": 0,
        "max_length": 128, "overlong": "drop", "warmup": 0.0, "classification_positive_class": " yes",
        "classification_betas": [0.5, 2.0], "prompt_loss_weight": 0.1, "learning_rate_multiplier": 2.0,
        "publish_checkpoints": 3,
    }  # fmt: skip
    assert request["data"] == [str(tmp_path / "a.jsonl")] * 2


def test_files_are_remembered_by_whole_paths(asked: list[Any], tmp_path: Path) -> None:
    (tmp_path / "own.jinja").write_text("x")
    options = ["--validation", "a.jsonl", "--template", "own.jinja", "--continue-from", "base", "--out", "r"]
    assert called("train", "--model", "./base", "--data", "a.jsonl", *options) == 0
    ((_, request, _),) = asked
    assert request["validation"] == str(tmp_path / "a.jsonl")
    assert request["template"] == str(tmp_path / "own.jinja")
    assert request["continue_from"] == str(tmp_path / "base")


def test_a_recipe_gives_way_to_options(asked: list[Any]) -> None:
    assert (
        called("train", "--model", "base", "--data", "a.jsonl", "--recipe", "self-llm", "--rank", "4", "--out", "r")
        == 0
    )
    ((_, request, _),) = asked
    assert request["rank"] == 4
    assert request["alpha"] == RECIPES["self-llm"]["alpha"]


def test_the_run_gets_a_name_of_its_own(asked: list[Any], tmp_path: Path) -> None:
    assert called("train", "--model", "base", "--data", "a.jsonl") == 0
    ((run, _, _),) = asked
    assert run.path.parent == tmp_path / "runs"
    assert re.fullmatch(r"base-\d{8}-\d{6}", run.path.name)


@pytest.mark.parametrize(
    ("words", "code", "told"),
    [
        ([], 2, "--model is missing."),
        (["--model", "base"], 2, "--data is missing."),
        (["--model", "base", "--data", "no.jsonl"], 2, "--data: no.jsonl does not exist."),
        (["--model", "base", "--data", "."], 2, "--data: . is a folder, not a file."),
        (
            ["--model", "base", "--data", "a.jsonl", "--validation", "v.jsonl"],
            2,
            "--validation: v.jsonl does not exist.",
        ),
        (["--model", "base", "--data", "a.jsonl", "--epochs", "some"], 2, "--epochs: found 'some'; "),
        (["--model", "base", "--data", "a.jsonl", "--rank", "0"], 2, "--rank: found '0'; "),
        (
            ["--model", "base", "--data", "a.jsonl", "--method", "magic"],
            2,
            "--method: found 'magic'; wanted one of lora",
        ),
        (["--model", "base", "--data", "a.jsonl", "--method", "full", "--rank", "4"], 2, "rank means nothing with"),
        (
            ["--model", "base", "--data", "a.jsonl", "--recipe", "soup"],
            2,
            "--recipe: found 'soup'; wanted one of self-llm.",
        ),
        (["--model", "./none", "--data", "a.jsonl"], 2, "is no model folder"),
        (["--resume", "nowhere"], 2, "is not a run folder"),
        (["--resume", "r", "--rank", "4", "--out", "x"], 2, "--rank, --out cannot be given with it."),
    ],
)
def test_refusals_leave_nothing_behind(
    words: list[str], code: int, told: str, asked: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert called("train", *words) == code
    assert told in capsys.readouterr().err
    assert asked == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "base"]


def test_a_folder_that_holds_a_run_is_refused(asked: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert called("train", "--model", "base", "--data", "a.jsonl", "--out", "r") == 0
    assert called("train", "--model", "base", "--data", "a.jsonl", "--out", "r") == 75
    assert "already holds a run." in capsys.readouterr().err
    assert len(asked) == 1


def test_resume_takes_the_request_as_it_was(asked: list[Any], tmp_path: Path) -> None:
    assert called("train", "--model", "base", "--data", "a.jsonl", "--rank", "3", "--out", "r") == 0
    asked[0][0].ask_to_stop()
    assert called("train", "--resume", "r") == 0
    assert asked[1][1] == asked[0][1]
    assert not asked[1][0].stop_asked


def test_a_run_in_use_is_not_resumed(asked: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert called("train", "--model", "base", "--data", "a.jsonl", "--out", "r") == 0
    with asked[0][0].owned():
        assert called("train", "--resume", "r") == 75
    assert "Another process is working on" in capsys.readouterr().err


def test_a_damaged_request_is_said_to_be(asked: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "request.json").write_text("{")
    assert called("train", "--resume", "r") == 2
    assert "request.json is damaged" in capsys.readouterr().err


# -- with a real engine ------------------------------------------------------------------------------------------------


def start(*words: str | Path, **options: Any) -> subprocess.Popen[str]:
    here = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "luthier.cli", "train", *map(str, words)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8", env=here, **options,
    )  # fmt: skip


def wait_for(run: RunFolder, kind: str, process: subprocess.Popen[str], step: int = 0) -> dict[str, Any]:
    """The first event of `kind` (at or after `step`), as soon as it is there."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        for _, event in run.events():
            if event["type"] == kind and event.get("step", 0) >= step:
                return event
        time.sleep(0.02)
    raise AssertionError(f"no {kind} event; the command said: {process.communicate(timeout=10)}")


@pytest.fixture(scope="module")
def whole(tiny: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int, str, str]:
    """(run folder, exit code, stdout, stderr) of a run with --json that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole") / "r"
    with start("--model", tiny, "--data", data, *SAME, "--out", folder, "--json") as process:
        out, err = process.communicate(timeout=200)
    return folder, process.returncode, out, err


def test_json_of_a_real_run(whole: tuple[Path, int, str, str]) -> None:
    folder, code, out, err = whole
    assert (code, err) == (0, "")
    lines = [json.loads(line) for line in out.splitlines()]
    kinds = [line["type"] for line in lines[:-1]]
    assert (kinds[0], kinds[-1]) == ("started", "finished")
    assert {"phase", "prepared", "step", "validation", "checkpoint"} <= set(kinds)
    final = lines[-1]
    assert set(final) == {"run", "status", "model", "report"}
    assert (final["run"], final["status"], final["model"]) == (str(folder), "succeeded", str(folder / "model"))
    whole_report = json.loads((folder / "report.json").read_text())
    del whole_report["proof"]["rows"]
    assert final["report"] == whole_report
    assert final["report"]["proof"]["sentence"]
    assert final["report"]["tuned"]["loss"] < final["report"]["base"]["loss"]


def test_plain_lines_of_a_real_run(tiny: Path, data: Path, tmp_path: Path) -> None:
    with start("--model", tiny, "--data", data, "--epochs", "1", "--out", "r", cwd=tmp_path) as process:
        out, err = process.communicate(timeout=200)
    assert (process.returncode, err) == (0, "")
    lines = out.splitlines()
    assert lines[0] == f"Run r: {tiny}, lora"
    assert any(line.startswith("step 1/") for line in lines)
    assert lines[-1] == "measure it:      luthier evaluate r --data FILE"
    assert "\x1b" not in out


def test_bad_data_is_told_with_its_problems(tiny: Path, data: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text(data.read_text() + "nonsense\n" * 30)
    with start("--model", tiny, "--data", bad, "--out", tmp_path / "r") as process:
        _, err = process.communicate(timeout=200)
    assert process.returncode == 2
    lines = err.splitlines()
    assert lines[0].startswith("Error: 30 problems in the data")
    assert "line 31: found 'nonsense'" in lines[1]
    assert lines[21] == "  and 10 more."
    assert "Traceback" not in err


def test_ctrl_c_then_resume_is_as_if_never_stopped(
    whole: tuple[Path, int, str, str], tiny: Path, data: Path, tmp_path: Path
) -> None:
    run = RunFolder(tmp_path / "r")
    with start("--model", tiny, "--data", data, *SAME, "--out", run.path) as process:
        wait_for(run, "step", process, step=3)
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert out.splitlines()[-1] == f"  luthier train --resume {run.path}"
    assert "Stopping after this step, at a checkpoint." in out
    assert not (run.model / WEIGHTS).exists()
    with start("--resume", run.path, "--json") as process:
        out, _ = process.communicate(timeout=200)
    lines = [json.loads(line) for line in out.splitlines()]
    assert lines[0]["resumed_from"] >= 3
    assert lines[-1]["status"] == "succeeded"
    assert (run.model / WEIGHTS).read_bytes() == (whole[0] / "model" / WEIGHTS).read_bytes()


def test_an_engine_killed_in_the_middle(tiny: Path, data: Path, tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "r")
    options = ["--epochs", "200", "--checkpoint-every", "2", "--seed", "7", "--out", run.path]
    with start("--model", tiny, "--data", data, *options) as process:
        wait_for(run, "checkpoint", process, step=4)
        os.kill(int(wait_for(run, "started", process)["pid"]), signal.SIGKILL)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "Error: The engine was killed (signal 9), often because memory ran out." in err
    assert f"luthier train --resume {run.path}" in err
    assert "Traceback" not in err
