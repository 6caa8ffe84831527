"""`luthier sweep`: real engines on a tiny model; halving, failures, kills, and the winner trained again."""

from __future__ import annotations

import html
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from luthier.cli import sweeping
from luthier.cli.sweep_view import Lines
from luthier.data.formats import read_examples
from luthier.data.split import prompt_key
from luthier.spec.errors import BadSetting, NotNow
from luthier.spec.run import RunFolder
from luthier.spec.sweep import Result
from tests.cli.calling import caller
from tests.engine.runs import chats, events, preferences, write

WEIGHTS = "adapter_model.safetensors"
SAME = (
    "--seed", "7", "--batch-size", "4", "--precision", "float32", "--max-steps", "9", "--checkpoint-every", "1",
    "--dropout", "0.1", "--forgetting", "off", "--proof-rows", "4",
)  # fmt: skip
RATES = ("--learning-rate-multiplier", "1,10,1e38", "--learning-rate", "1e-3")  # the last one diverges


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("data") / "rows.jsonl", chats(40))


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


def start(home: Path, tiny: Path, data: Path, out: Path, *more: str) -> subprocess.Popen[str]:
    words = ["sweep", "--model", str(tiny), "--data", str(data), "--out", str(out), *SAME, *more]
    return luthier(home, *words)


def luthier(home: Path, *words: str) -> subprocess.Popen[str]:
    here = {**os.environ, "LUTHIER_HOME": str(home), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "luthier.cli", *words]
    return subprocess.Popen(
        command, env=here, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=home, start_new_session=True
    )


def ended(process: subprocess.Popen[str], code: int = 0) -> tuple[str, str]:
    out, err = process.communicate(timeout=600)
    assert process.returncode == code, out + err
    return out, err


def results(out: Path) -> Result:
    return Result.model_validate_json((out / "results.json").read_text())


@pytest.fixture(scope="module")
def done(home: Path, tiny: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A whole sweep of three trials, one of which diverges; its folder, and what --json printed."""
    out = tmp_path_factory.mktemp("sweeps") / "whole"
    said, _ = ended(start(home, tiny, data, out, *RATES, "--json"))
    found: dict[str, Any] = json.loads(said)
    return out, found


def figures(out: Path) -> list[Any]:
    """What decides and what came of it, without times."""
    found = results(out)
    trials = [
        (each.number, each.values, each.status, [rung.model_dump() for rung in each.rungs]) for each in found.trials
    ]
    return [trials, found.winner, found.shares, found.status]


# -- a whole one -------------------------------------------------------------------------------------------------------


def test_the_better_one_goes_on_and_one_that_diverges_is_told(done: tuple[Path, dict[str, Any]]) -> None:
    out, told = done
    found = results(out)
    assert told["winner"] == found.winner and told["status"] == "finished" and "rows" not in told["proof"]
    assert found.shares == ["1/3", "1"] and [each.number for each in found.trials] == [1, 2, 3]
    first, second, third = found.trials
    assert third.failed is not None and "loss became" in third.failed and third.status == "failed"
    losses = {each.number: each.rungs[0].loss for each in (first, second)}
    best = min(losses, key=lambda number: losses[number] or 0)
    assert found.winner == best
    won, left = (first, second) if best == 1 else (second, first)
    assert [(rung.share, rung.step, rung.steps) for rung in won.rungs] == [("1/3", 3, 9), ("1", 9, 9)]
    assert [rung.share for rung in left.rungs] == ["1/3"] and left.status == "left"
    assert not RunFolder(left.run).model.exists() and RunFolder(won.run).model.is_dir()


def test_what_decides_is_measured_again_from_the_runs(done: tuple[Path, dict[str, Any]]) -> None:
    """Each rung's loss is the validation loss at that step, as the run itself tells it."""
    for trial in results(done[0]).trials:
        told = {event["step"]: event["loss"] for event in events(RunFolder(trial.run), "validation")}
        assert all(told[rung.step] == rung.loss for rung in trial.rungs)


def test_rows_that_decide_do_not_prove(done: tuple[Path, dict[str, Any]], data: Path) -> None:
    out = done[0]
    won = next(each for each in results(out).trials if each.status == "won")
    request = json.loads(RunFolder(won.run).request.read_text())
    files = [request["data"][0], request["validation"], request["proof_data"]]
    keys = [{prompt_key(item) for item in read_examples(Path(path))} for path in files]  # type: ignore[arg-type]
    assert [len(each) for each in keys] == [32, 4, 4]
    assert not keys[0] & keys[1] and not keys[0] & keys[2] and not keys[1] & keys[2]
    assert keys[0] | keys[1] | keys[2] == {prompt_key(item) for item in read_examples(data)}  # type: ignore[arg-type]
    proof = json.loads(RunFolder(won.run).report.read_text())["proof"]
    asked = {json.loads(line)["messages"][0]["content"] for line in Path(files[2]).read_text().splitlines()}
    assert {row["prompt"] for row in proof["rows"]} == asked
    assert results(out).proof is not None and results(out).proof.model_dump() == proof  # type: ignore[union-attr]


def test_the_command_trains_the_winner_again_to_the_byte(
    done: tuple[Path, dict[str, Any]], home: Path, tmp_path: Path
) -> None:
    words = shlex.split(done[1]["command"])
    assert words[:2] == ["luthier", "train"] and words[-2] == "--out"
    ended(luthier(home, *words[1:-1], str(tmp_path / "again")))
    won = next(each for each in results(done[0]).trials if each.status == "won")
    assert (tmp_path / "again" / "model" / WEIGHTS).read_bytes() == (Path(won.run) / "model" / WEIGHTS).read_bytes()


def test_report_works_on_every_trial_that_was_measured(
    done: tuple[Path, dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    report = caller("report", capsys)
    for trial in results(done[0]).trials:
        code, out, err = report(trial.run)
        if trial.status == "failed":
            assert code == 2 and "no report yet" in err
        else:
            assert code == 0 and "validation loss" in out
            assert ("It was left after step 3 of 9" in out) == (trial.status == "left")


def test_the_page_shows_every_trial_and_the_command(done: tuple[Path, dict[str, Any]]) -> None:
    page = (done[0] / "report.html").read_text()
    assert page.count("<polyline") == 3 and "<script" not in page and 'class="won"' in page
    assert "--learning-rate-multiplier" in page and "loss became" in page
    shown = html.unescape(page.rpartition("<pre>")[2].partition("</pre>")[0])
    assert all(line.count(" --") <= 1 for line in shown.splitlines())
    assert shlex.split(shown.replace("\\\n", "")) == shlex.split(done[1]["command"])


def test_the_same_command_again_runs_nothing(
    done: tuple[Path, dict[str, Any]], home: Path, tiny: Path, data: Path
) -> None:
    before = {path: path.read_bytes() for path in done[0].glob("trials/*/events.jsonl")}
    out, _ = ended(start(home, tiny, data, done[0], *RATES, "--json"))
    assert json.loads(out) == done[1] and len(before) == 3
    assert {path: path.read_bytes() for path in before} == before
    out, _ = ended(luthier(home, "sweep", "--resume", str(done[0])))
    for words in ("The winner is trial", "luthier train", "failed:", "at 1/3", "Successive halving"):
        assert words in out


def test_another_command_in_the_same_folder_is_refused(
    done: tuple[Path, dict[str, Any]], home: Path, tiny: Path, data: Path
) -> None:
    _, err = ended(start(home, tiny, data, done[0], *RATES, "--rank", "4"), 75)
    assert "already holds another sweep" in err
    _, err = ended(luthier(home, "sweep", "--resume", str(done[0]), "--rank", "4"), 2)
    assert "--resume goes on" in err
    _, err = ended(luthier(home, "sweep", "--resume", str(home / "nothing")), 2)
    assert "holds no sweep" in err


# -- kills -------------------------------------------------------------------------------------------------------------


def test_killed_at_any_instant_the_same_command_goes_on(
    done: tuple[Path, dict[str, Any]], home: Path, tiny: Path, data: Path, tmp_path: Path
) -> None:
    """The sweep alone, whose engine lives on and is waited for; then both. No rung is measured twice."""
    out = tmp_path / "killed"
    for wanted, whole in ((1, False), (3, True), (5, True)):
        process = start(home, tiny, data, out, *RATES)
        while process.poll() is None and steps(out) < wanted:
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        if whole:
            for pid in engines(out):
                os.kill(pid, signal.SIGKILL)
    ended(start(home, tiny, data, out, *RATES, "--json"))
    assert figures(out) == figures(done[0])
    for trial in results(out).trials:
        rungs = [event["share"] for event in events(RunFolder(trial.run), "rung")]
        assert len(rungs) == len(set(rungs))
    won = results(out).winner
    assert won is not None
    name = Path("trials") / f"{won:02}" / "model" / WEIGHTS
    assert (out / name).read_bytes() == (done[0] / name).read_bytes()
    assert not list(out.glob(".rows.tmp"))


def steps(out: Path) -> int:
    return sum(len(events(RunFolder(path), "step")) for path in out.glob("trials/*"))


def engines(out: Path) -> list[int]:
    """The processes that began last on each trial and are there still."""
    found = []
    for path in out.glob("trials/*"):
        pids = [event["pid"] for event in events(RunFolder(path), "started")]
        found += [pid for pid in pids[-1:] if f"{path}" in _command(pid)]
    return found


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return ""


def test_an_engine_that_dies_without_a_word_is_told_and_the_others_go_on(
    home: Path, tiny: Path, data: Path, tmp_path: Path
) -> None:
    out = tmp_path / "sweep"
    process = start(home, tiny, data, out, "--rank", "2,4", "--halving", "1", "--json")
    first = RunFolder(out / "trials" / "01")
    while not events(first, "step"):
        assert process.poll() is None
        time.sleep(0.02)
    for pid in engines(out):
        os.kill(pid, signal.SIGKILL)
    ended(process)
    found = results(out)
    assert [each.status for each in found.trials] == ["failed", "won"] and found.shares == ["1"]
    assert "killed (signal 9), often because memory ran out" in str(found.trials[0].failed)
    before = first.events_file.read_bytes()
    ended(luthier(home, "sweep", "--resume", str(out)))
    assert first.events_file.read_bytes() == before


def test_ctrl_c_stops_at_a_checkpoint(home: Path, tiny: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "sweep"
    process = start(home, tiny, data, out, "--rank", "2,4", "--epochs", "500", "--max-steps", "4000")
    while not events(RunFolder(out / "trials" / "01"), "step"):
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, err = ended(process, 130)
    assert f"luthier sweep --resume {out}" in err
    assert events(RunFolder(out / "trials" / "01"), "step")[-1]["step"] < 4000 / 3, "long before its rung"
    assert events(RunFolder(out / "trials" / "01"))[-1]["type"] == "stopped"


def test_ctrl_c_counts_when_the_trial_is_at_its_rung(home: Path, tiny: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "sweep"
    process = start(home, tiny, data, out, "--rank", "2,4")
    while [step["step"] for step in events(RunFolder(out / "trials" / "01"), "step")][-1:] != [3]:  # of 9
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    ended(process, 130)
    assert results(out).status != "finished"
    ended(luthier(home, "sweep", "--resume", str(out)))
    assert results(out).status == "finished"


def test_a_sweep_without_a_trial_left_fails(home: Path, tiny: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "sweep"
    _, err = ended(start(home, tiny, data, out, "--learning-rate-multiplier", "1e38,2e38", "--learning-rate", "0.1"), 2)
    assert "All 2 trials failed; the first (learning rate multiplier 1e+38)" in err
    assert results(out).status == "failed"


# -- what is shared ----------------------------------------------------------------------------------------------------


def test_by_metric_and_rendered_rows_are_made_once(home: Path, tiny: Path, tmp_path: Path) -> None:
    """Rows over 256 KiB: the first trial renders them, the others find them. An entry that is found is touched and
    stays the same file; one that is made again would be another."""
    rows = chats(130)
    for row in rows:
        row["unused"] = "x" * 4000  # bytes of data without tokens
    data = write(tmp_path / "long.jsonl", rows)
    out, own = tmp_path / "sweep", tmp_path / "home"
    own.mkdir()
    options = ("--rank", "2,4", "--by", "metric", "--metric", "exact_match", "--max-steps", "2")
    process = start(own, tiny, data, out, *options, "--json")
    kept: dict[str, os.stat_result] = {}
    while process.poll() is None:
        for path in own.glob("cache/rendered/*.npz"):
            kept.setdefault(path.name, path.stat())
        time.sleep(0.02)
    said, _ = ended(process)
    found = json.loads(said)
    entries = {path.name: path.stat() for path in own.glob("cache/rendered/*.npz")}
    assert len(entries) == 1 and entries.keys() == kept.keys()  # of the training rows: the others are few
    for name, now in entries.items():
        assert now.st_ino == kept[name].st_ino and now.st_mtime_ns > kept[name].st_mtime_ns
    assert len(list(out.glob("trials/*"))) == 2
    for trial in results(out).trials:
        for rung in trial.rungs:
            assert (rung.metric, rung.rows) == ("exact_match", 13) and rung.score is not None
    assert found["by"] == "metric"


def test_over_pairs(home: Path, tiny: Path, tmp_path: Path) -> None:
    """By which answer is likelier, as runs of two betas; what the start makes of the pairs is computed once."""
    data, out, own = write(tmp_path / "pairs.jsonl", preferences(40)), tmp_path / "sweep", tmp_path / "home"
    own.mkdir()
    words = ["sweep", "--model", str(tiny), "--data", str(data), "--out", str(out), "--objective", "dpo", "--seed", "7"]
    words += [
        "--beta",
        "0.05,0.5",
        "--by",
        "metric",
        "--max-steps",
        "6",
        "--precision",
        "float32",
        "--forgetting",
        "off",
    ]
    _, err = ended(luthier(own, *[word for word in words if word not in ("--by", "metric")]), 2)
    assert "Losses of different betas" in err
    said, _ = ended(luthier(own, *words, "--json"))
    assert json.loads(said)["winner"] in (1, 2)
    for trial in results(out).trials:
        assert {rung.metric for rung in trial.rungs} == {"preference"}
    told = [event for run in out.glob("trials/*") for event in events(RunFolder(run), "forecast")]
    assert len(told) >= 2 and sorted(event["reference_seconds"] > 0 for event in told) == [False] * (len(told) - 1) + [
        True
    ]
    assert len(list(own.glob("cache/references/*.jsonl"))) == 1


def test_trials_are_weighed_by_what_they_forgot(home: Path, tiny: Path, data: Path, tmp_path: Path) -> None:
    """By what their events tell: the one that forgot least of those that keep the gain, then its scale."""
    out = tmp_path / "sweep"
    words = ["sweep", "--model", str(tiny), "--data", str(data), "--validation", "0.2", "--out", str(out)]
    words += ["--rank", "2,4", "--halving", "1", "--max-steps", "6", "--learning-rate", "1e-2", "--seed", "3"]
    words += ["--metric", "text", "--by", "metric", "--keep-general", "--precision", "float32", "--proof-rows", "2"]
    said, _ = ended(luthier(home, *words))
    found = results(out)
    rungs = {trial.number: trial.rungs[0] for trial in found.trials}
    gains = {number: rung.score - rung.base for number, rung in rungs.items()}  # type: ignore[operator]
    able = [number for number in gains if gains[number] >= 0.95 * max(gains.values())]
    assert max(gains.values()) > 0
    assert found.winner == min(able, key=lambda number: (rungs[number].forgetting, -gains[number], number))
    assert "keep 95% of the best gain" in found.rule and "and the general ability lost" in said
    won = RunFolder(next(trial.run for trial in found.trials if trial.number == found.winner))
    assert json.loads(won.report.read_text())["keeping"]["rows"] == 8  # all deciding rows: others prove
    assert found.command is not None and "--keep-general" in found.command


def test_a_changed_file_is_refused(tmp_path: Path) -> None:
    file = write(tmp_path / "rows.jsonl", chats(3))
    asked = sweeping.Asked(
        request={}, grid={}, halving=3, by="loss", given={}, files=sweeping.hashes({"data": [str(file)]}), kept_apart=""
    )
    sweeping.refuse_changed(asked)
    write(file, chats(4))
    with pytest.raises(BadSetting, match="is not what it was"):
        sweeping.refuse_changed(asked)
    file.unlink()
    with pytest.raises(BadSetting, match="is not what it was"):
        sweeping.refuse_changed(asked)


# -- rows kept apart ---------------------------------------------------------------------------------------------------


def apart(tmp_path: Path, **values: Any) -> tuple[dict[str, Any], str]:
    folder = sweeping.Folder(tmp_path / "sweep")
    folder.path.mkdir()
    return sweeping.keep_apart(values, folder, 3)


def prompts(path: str) -> set[bytes]:
    return {prompt_key(item) for item in read_examples(Path(path))}  # type: ignore[arg-type]


def test_a_validation_file_is_halved(tmp_path: Path) -> None:
    train, held = write(tmp_path / "a.jsonl", chats(5)), write(tmp_path / "b.jsonl", chats(10, 50))
    found, words = apart(tmp_path, data=[str(train)], validation=str(held))
    assert found["data"] == [str(train)] and "Halves of" in words
    decide, prove = prompts(found["validation"]), prompts(found["proof_data"])
    assert len(decide) == len(prove) == 5 and decide | prove == prompts(str(held))


def test_files_of_both_are_taken_as_they_are_and_what_they_share_is_said(tmp_path: Path) -> None:
    files = [write(tmp_path / f"{name}.jsonl", chats(5, n)) for name, n in (("a", 0), ("b", 50), ("c", 53))]
    train, decide, prove = map(str, files)
    found, words = apart(tmp_path, data=[train], validation=decide, proof_data=prove)
    assert found == {"data": [train], "validation": decide, "proof_data": prove}
    assert "2 prompts of the proof are in the other file too" in words


def test_a_proof_file_beside_a_share(tmp_path: Path) -> None:
    train, prove = write(tmp_path / "a.jsonl", chats(10)), write(tmp_path / "b.jsonl", chats(3, 50))
    found, _ = apart(tmp_path, data=[str(train)], validation="0.2", proof_data=str(prove))
    assert found["proof_data"] == str(prove)
    assert len(prompts(found["data"][0])) == 8 and len(prompts(found["validation"])) == 2


def test_what_cannot_be_parted_is_refused(tmp_path: Path) -> None:
    train = str(write(tmp_path / "a.jsonl", chats(10)))
    with pytest.raises(BadSetting, match="as much again is held out"):
        apart(tmp_path, data=[train], validation="0.5")
    with pytest.raises(BadSetting, match="Several data files"):
        sweeping.keep_apart({"data": [train, train]}, sweeping.Folder(tmp_path / "sweep"), 0)


def test_trials_share_the_precision_that_the_first_came_to(tmp_path: Path) -> None:
    """It is timed, so the next trial might come to another."""
    folder = sweeping.Folder(tmp_path / "sweep")
    asked = sweeping.Asked(
        request={"model": "m", "data": ["d"]}, grid={"rank": [2, 4]}, halving=3, by="loss", given={}, kept_apart=""
    )
    sweep = sweeping.Sweep(folder, asked, Lines())
    first = sweep._laid_out(sweep.result.trials[0])
    assert "precision" not in json.loads(first.request.read_text())
    first.spec.write_text(json.dumps({"settings": {"precision": "bfloat16"}}))
    second = sweep._laid_out(sweep.result.trials[1])
    assert json.loads(second.request.read_text()) == {"model": "m", "data": ["d"], "precision": "bfloat16", "rank": 4}


def test_one_process_at_a_time(tmp_path: Path) -> None:
    folder = sweeping.Folder(tmp_path / "sweep")
    with folder.owned(), pytest.raises(NotNow, match="Another process"), sweeping.Folder(folder.path).owned():
        pass
