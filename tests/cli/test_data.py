"""`luthier data show` and `luthier tokenize`: what they print is what training sees."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from luthier import cli
from luthier.cli.data import Painter
from luthier.data.formats import read_examples
from luthier.data.render import Renderer
from luthier.data.tokenizer import Tokenizer
from luthier.spec.data import Problem
from tests import tiny as tiny_models

ROOT = Path(__file__).parents[2]
THINKS = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' and not loop.last %}{{ message['content'].split('</think>')[-1] }}"
    "{% else %}{{ message['content'] }}{% endif %}{{ '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that the catalogue takes for a model; its weights are never opened."""
    folder = tiny_models.make_tokenizer(tmp_path_factory.mktemp("model"))
    (folder / "config.json").write_text('{"max_position_embeddings": 512}')
    (folder / "model.safetensors").write_bytes(b"")
    return folder


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LUTHIER_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)


def called(*words: str | Path) -> int:
    with pytest.raises(SystemExit) as leaving:
        cli.main([str(word) for word in words])
    return int(leaving.value.code or 0)


def chat(*turns: tuple[str, str], **keys: Any) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": text} for role, text in turns], **keys}


def write(path: Path, *records: Any) -> Path:
    lines = [record if isinstance(record, str) else json.dumps(record, ensure_ascii=False) for record in records]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def objects(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


GOOD = chat(("user", "Hi"), ("assistant", "你好 🐈"), ("user", "more"), ("assistant", "Paris."))


def test_json_is_what_training_sees(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write(tmp_path / "a.jsonl", GOOD, chat(("user", "a"), ("assistant", "b")))
    assert called("data", "show", file, "--model", model, "--json") == 0
    shown = objects(capsys)
    renderer = Renderer.load(model)
    rows = [
        row for example in read_examples(file) if not isinstance(example, Problem) for row in renderer.rows(example)
    ]
    assert [[token["id"] for token in one["tokens"]] for one in shown] == [row.ids for row in rows]
    assert [[token["weight"] for token in one["tokens"]] for one in shown] == [row.weights for row in rows]
    assert [one["supervised_text"] for one in shown] == ["你好 🐈<|im_end|>Paris.<|im_end|>", "b<|im_end|>"]
    assert [one["row"] for one in shown] == [1, 2]
    assert all(set(one) == {"row", "tokens", "supervised_text", "problems"} and one["problems"] == [] for one in shown)
    assert set(shown[0]["tokens"][0]) == {"id", "text", "weight"}


def test_json_gives_every_record_a_line(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write(tmp_path / "a.jsonl", "", GOOD, "nonsense", chat(("user", "a")), GOOD)
    assert called("data", "show", file, "--model", model, "--json") == 2
    shown = objects(capsys)
    assert [one["row"] for one in shown] == [1, 2, 3, 4]
    assert [bool(one["tokens"]) for one in shown] == [True, False, False, True]
    assert [one["supervised_text"] for one in shown[1:3]] == ["", ""]
    assert [[(found["line"], found["row"], found["severity"]) for found in one["problems"]] for one in shown] == [
        [], [(3, 2, "error")], [(4, 3, "error")], [],
    ]  # fmt: skip


def test_what_the_template_refuses_keeps_its_row(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = [{"type": "function", "function": {"name": "weather", "arguments": '{"city": "Bern"}'}}]
    turn = {"role": "assistant", "content": None, "tool_calls": calls}
    file = write(tmp_path / "a.jsonl", GOOD, {"messages": [{"role": "user", "content": "a"}, turn]}, GOOD)
    assert called("data", "show", file, "--model", model, "--json") == 2
    shown = objects(capsys)
    assert [(one["row"], bool(one["tokens"]), len(one["problems"])) for one in shown] == [
        (1, True, 0), (2, False, 1), (3, True, 0),
    ]  # fmt: skip
    assert shown[1]["problems"][0]["field"] == "messages[1]"


def test_a_record_that_becomes_two_rows_repeats_its_number(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tiny_models.make_tokenizer(tmp_path / "thinker", template=THINKS)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"")
    record = chat(("user", "a"), ("assistant", "<think>x</think>b"), ("user", "c"), ("assistant", "<think>y</think>d"))
    file = write(tmp_path / "a.jsonl", record, GOOD)
    assert called("data", "show", file, "--model", folder, "--json") == 0
    shown = objects(capsys)
    assert [one["row"] for one in shown] == [1, 1, 2]
    assert shown[1]["supervised_text"] == "<think>y</think>d<|im_end|>"


def test_pairs_show_both_answers(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write(tmp_path / "a.jsonl", {"prompt": "Why?", "chosen": "Because.", "rejected": "No."})
    assert called("data", "show", file, "--model", model, "--json") == 0
    shown = objects(capsys)
    assert [(each["row"], each["answer"]) for each in shown] == [(1, "preferred"), (1, "rejected")]
    assert shown[0]["supervised_text"].startswith("Because.") and shown[1]["supervised_text"].startswith("No.")
    assert called("data", "show", file, "--model", model) == 0
    text = capsys.readouterr().out
    assert "-- row 1 (line 1): preferred, " in text and "-- row 1 (line 1): rejected, " in text


def test_row_and_limit(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write(tmp_path / "a.jsonl", *[chat(("user", "a"), ("assistant", str(n))) for n in range(1, 6)])
    assert called("data", "show", file, "--model", model, "--json", "--row", "4") == 0
    assert [one["supervised_text"] for one in objects(capsys)] == ["4<|im_end|>"]
    assert called("data", "show", file, "--model", model, "--json", "--limit", "2") == 0
    assert [one["row"] for one in objects(capsys)] == [1, 2]
    assert called("data", "show", file, "--model", model, "--row", "9") == 2
    assert capsys.readouterr().err == "Error: --row: the file has no record 9.\n"
    assert called("data", "show", file, "--model", model, "--row", "1", "--limit", "1") == 2


def test_rows_that_training_would_refuse_are_problems(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(tmp_path / "a.jsonl", GOOD)
    assert called("data", "show", file, "--model", model, "--json", "--max-length", "20") == 2
    (shown,) = objects(capsys)
    assert shown["problems"][0]["found"] == f"a row of {len(shown['tokens'])} tokens"
    assert shown["problems"][0]["wanted"] == "at most 20"


def test_texts_are_cut_as_training_cuts_them(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "a.txt"
    file.write_text("the quick brown fox " * 20)
    assert called("data", "show", file, "--model", model, "--json", "--max-length", "16") == 0
    shown = objects(capsys)
    assert len(shown) > 3
    assert all(len(one["tokens"]) <= 16 and one["tokens"][0]["weight"] == 0 for one in shown)


def test_a_warning_about_the_file_stands_on_row_0(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(tmp_path / "a.jsonl", GOOD, {**GOOD, "extra": 1})
    assert called("data", "show", file, "--model", model, "--json") == 0
    shown = objects(capsys)
    assert [one["row"] for one in shown] == [1, 2, 0]
    assert (shown[2]["tokens"], shown[2]["problems"][0]["severity"]) == ([], "warning")


def test_text_marks_what_is_learnt(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write(tmp_path / "a.jsonl", GOOD, "nonsense")
    assert called("data", "show", file, "--model", model) == 2
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "Learnt text stands between ⟦ and ⟧."
    assert lines[2:8] == [
        "<|im_start|>user⏎",
        "Hi<|im_end|>⏎",
        "<|im_start|>assistant⏎",
        "⟦你好 🐈<|im_end|>⟧⏎",
        "<|im_start|>user⏎",
        "more<|im_end|>⏎",
    ]
    assert any(line.startswith("Problem: a.jsonl: line 2") for line in lines)
    assert lines[-1].startswith("1 row, ")
    assert lines[-1].endswith("1 problem, 0 warnings.")


def test_the_whole_file_is_checked_whatever_is_shown(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(tmp_path / "a.jsonl", *[GOOD] * 600, "nonsense", *[GOOD] * 10)
    assert called("data", "show", file, "--model", model) == 2
    told = capsys.readouterr().out
    assert told.count("-- row ") == 3
    assert "line 601" in told
    assert told.splitlines()[-1].startswith("610 rows, ")


def test_colours_follow_the_weights(model: Path, tmp_path: Path) -> None:
    renderer = Renderer.load(model)
    painter = Painter(Console(file=io.StringIO(), force_terminal=True), renderer.tokenizer)
    example = next(read_examples(write(tmp_path / "a.jsonl", GOOD)))
    assert not isinstance(example, Problem)
    row = renderer.rows(example)[0]
    text = painter.text(row)
    learnt = "".join(text.plain[span.start : span.end] for span in text.spans if "green" in str(span.style))
    assert learnt == "你好 🐈<|im_end|>Paris.<|im_end|>"
    assert text.plain.replace("⏎\n", "\n") == renderer.tokenizer.decode(row.ids)


def test_ids_are_listed(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write(tmp_path / "a.jsonl", chat(("user", "a"), ("assistant", "b")))
    assert called("data", "show", file, "--model", model, "--ids") == 0
    renderer = Renderer.load(model)
    cells = [line.split() for line in capsys.readouterr().out.splitlines()]
    start = renderer.tokenizer.control_ids["<|im_start|>"]
    assert [str(start), "<|im_start|>", "0"] in cells
    assert [str(renderer.stop_ids[0]), "<|im_end|>", "1"] in cells


def test_weights_of_prompts_are_shown(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What --prompt-loss-weight does to training, prompt/completion rows only; the answer alone counts as learnt."""
    file = write(tmp_path / "a.jsonl", {"prompt": "one two ->", "completion": " three"})
    talk = write(tmp_path / "b.jsonl", chat(("user", "a"), ("assistant", "b")))
    for path, weights in ((file, {0, 0.25, 1}), (talk, {0, 1})):
        assert called("data", "show", path, "--model", model, "--json", "--prompt-loss-weight", "0.25") == 0
        shown = json.loads(capsys.readouterr().out)
        assert {token["weight"] for token in shown["tokens"]} == weights
        assert shown["supervised_text"] == {file: " three<|im_end|>", talk: "b<|im_end|>"}[path]
    assert called("data", "show", file, "--model", model, "--ids", "--prompt-loss-weight", "0.25") == 0
    assert ["0.25"] in [line.split()[-1:] for line in capsys.readouterr().out.splitlines()]


def test_ascii_terminals(model: Path, tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", GOOD)
    here = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "LC_ALL": "C", "PYTHONIOENCODING": "ascii"}
    show = [sys.executable, "-m", "luthier.cli", "data", "show", str(file), "--model", str(model)]
    plain = subprocess.run(show, capture_output=True, env=here, timeout=120)
    assert (plain.returncode, plain.stderr) == (0, b"")
    assert rb"[[?? ?<|im_end|>]]\n" in plain.stdout
    as_json = subprocess.run([*show, "--json"], capture_output=True, env=here, timeout=120)
    assert json.loads(as_json.stdout)["supervised_text"] == "你好 🐈<|im_end|>Paris.<|im_end|>"


@pytest.mark.parametrize("file", ["missing.jsonl", "."])
def test_no_such_file(file: str, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert called("data", "show", file, "--model", model) == 2
    assert capsys.readouterr().err.startswith(f"Error: No data file {file}.")


# -- tokenize ----------------------------------------------------------------------------------------------------------


def test_tokenize_json(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert called("tokenize", "The cat 🐈<|im_end|>", "--model", model, "--json") == 0
    (shown,) = objects(capsys)
    tokenizer = Tokenizer(model)
    assert [token["id"] for token in shown["tokens"]] == tokenizer.plain("The cat 🐈<|im_end|>")
    assert bytes(byte for token in shown["tokens"] for byte in token["bytes"]).decode() == "The cat 🐈<|im_end|>"
    assert tokenizer.control_ids["<|im_end|>"] not in [token["id"] for token in shown["tokens"]]
    parts = [token for token in shown["tokens"] if token["text"] == "\ufffd"]
    assert bytes(byte for token in parts for byte in token["bytes"]).decode() == "🐈"


@given(st.text())
@settings(max_examples=100, deadline=None)
def test_the_bytes_of_the_tokens_are_the_bytes_of_the_text(model: Path, text: str) -> None:
    tokenizer = _tokenizer(model)
    assert b"".join(tokenizer.token_bytes(token) for token in tokenizer.plain(text)) == text.encode()


_loaded: dict[Path, Tokenizer] = {}


def _tokenizer(folder: Path) -> Tokenizer:
    if folder not in _loaded:
        _loaded[folder] = Tokenizer(folder)
    return _loaded[folder]


def test_tokenize_table(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert called("tokenize", "a é\n", "--model", model) == 0
    told = capsys.readouterr().out
    cells = [line.split() for line in told.splitlines()]
    tokenizer = Tokenizer(model)
    first, *_, last = tokenizer.plain("a é\n")
    assert ["a", str(first), "61"] in cells
    assert ["⏎", str(last), "0a"] in cells
    assert "for 4 characters." in told


def test_tokenize_loads_no_torch(model: Path) -> None:
    code = (
        "import sys\nfrom luthier.cli import main\n"
        f"try:\n    main(['tokenize', 'a', '--model', {str(model)!r}])\nexcept SystemExit:\n    pass\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    here = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    subprocess.run([sys.executable, "-c", code], check=True, env=here, timeout=120, stdout=subprocess.DEVNULL)
