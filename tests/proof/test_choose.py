"""The metric follows from the references; a name that they cannot have is refused; graders of the user's own."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from luthier.proof.choose import METRICS, choose
from luthier.proof.graders import grader
from luthier.spec.data import Completion, Example
from luthier.spec.errors import BadSetting, UserError
from luthier.spec.proof import CHOSEN_METRICS

CALL = '{"name": "find", "arguments": {"a": 1}}'


@pytest.mark.parametrize(
    ("wanted", "known", "metric"),
    [
        (["pos", "neg"] * 4, [], "classification"),
        (["pos", "neg"], ["pos", "neg"] * 3, "classification"),  # the training rows tell
        (["pos", "neg"], [], "exact_match"),
        (["1", "0"] * 5, [], "classification"),
        ([f"#### {n}" for n in range(10)], [], "numeric"),
        ([f"So {n} + 1.\n#### {n + 1}" for n in range(10)], [], "numeric"),
        ([f"So {n} + 1." for n in range(10)], [], "exact_match"),
        (['{"a": 1}', '["b"]'], [], "json"),
        (['{"a": 1}', "none"], [], "exact_match"),
        ([CALL, *["I am done here, thank you very much for the talk."] * 3], [], "tool_calls"),
        ([CALL, *[f"I am done here, {n} times, thank you very much." for n in range(9)]], [], "text"),
        (["A long answer that says a lot in its own words.", "Another one, just as long, about nothing."], [], "text"),
        ([], [], "perplexity"),
    ],
)  # fmt: skip
def test_the_metric_that_fits(wanted: list[str], known: list[str], metric: str) -> None:
    found, why = choose("auto", wanted, known)
    assert found.name == metric
    assert why.endswith(".")


@pytest.mark.parametrize(
    ("asked", "wanted", "words"),
    [
        ("bleu", ["a"], "found 'bleu'; wanted auto, exact_match, "),
        ("preference", ["a"], "found 'preference'; wanted auto, exact_match, "),
        ("numeric", ["#### 4", "four"], "found the reference 'four'"),
        ("json", ['{"a": 1}', "a"], "wanted a JSON object or list"),
        ("perplexity", ["a"], "the held-out rows are answers"),
        ("text", [], "the held-out rows are plain texts"),
    ],
)
def test_a_metric_that_does_not_fit_is_refused(asked: str, wanted: list[str], words: str) -> None:
    with pytest.raises(BadSetting, match=words):
        choose(asked, wanted)


def test_a_name_is_taken_at_its_word() -> None:
    assert choose("text", ["pos", "neg"] * 4)[0].name == "text"
    assert set(METRICS) == {*CHOSEN_METRICS, "preference"}  # which follows from the rows and cannot be asked for


def scores(metric: object, answers: list[str]) -> list[float]:
    from luthier.proof.metrics import Metric

    assert isinstance(metric, Metric)
    examples: list[Example] = [Completion(f"q{n}", "w") for n in range(len(answers))]
    return metric.score(answers, ["w"] * len(answers), examples).rows


def test_a_function_grades(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_grader_a.py").write_text(
        "def score(answer, wanted, prompt):\n    return len(answer) / 4 if prompt == 'q0' else answer == wanted\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert scores(grader("own_grader_a:score"), ["ab", "w", "x"]) == [0.5, 1.0, 0.0]
    with pytest.raises(UserError, match=r"answer 1 the score 2\.0; wanted a number from 0 to 1"):
        scores(grader("own_grader_a:score"), ["12345678"])
    with pytest.raises(BadSetting, match="cannot be loaded"):
        grader("own_grader_a:nothing")
    with pytest.raises(BadSetting, match="cannot be loaded"):
        grader("no module")


def test_a_command_grades_lines(tmp_path: Path) -> None:
    script = tmp_path / "grade.py"
    script.write_text(
        "import json, sys\n"
        "for line in sys.stdin:\n"
        "    row = json.loads(line)\n"
        "    print(float(row['answer'] == row['wanted'] and row['prompt'].startswith('q')))\n"
    )
    assert scores(grader(command=f"{sys.executable} {script}"), ["w", "ü\n", "w"]) == [1.0, 0.0, 1.0]
    script.write_text("print(1)\n")
    with pytest.raises(UserError, match="wrote 1 lines for 2 answers"):
        scores(grader(command=f"{sys.executable} {script}"), ["w", "w"])
    script.write_text("import sys\nsys.exit('no such thing')\n")
    with pytest.raises(UserError, match="exit code 1: no such thing"):
        scores(grader(command=f"{sys.executable} {script}"), ["w"])
    with pytest.raises(BadSetting, match="cannot be run"):
        scores(grader(command="no-such-command-here"), ["w"])
