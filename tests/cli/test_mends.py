"""Every command that `luthier data check` proposes runs as it is printed, and what it mends is then gone."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest

from luthier import cli
from luthier.data.findings import KINDS
from tests.cli.test_check import model as model  # the fixture
from tests.data.record_files import TOOL, call, chat
from tests.data.test_doctor import row, sentence, write

# By a person.
LOOKED_AT = {"pairs", "outlier", "missing_system", "label_balance", "mixed_languages", "contradiction", "other"}


def tool_row(n: int, *calls: Any, tools: Any = (TOOL,)) -> dict[str, Any]:
    asked = {"role": "user", "content": sentence(n)}
    results = [{"role": "tool", "tool_call_id": "call_id", "content": "done"}] * len(calls)
    answer = {"role": "assistant", "content": sentence(n + 2000)}
    return chat(asked, {"role": "assistant", "content": None, "tool_calls": list(calls)}, *results, answer) | {
        "tools": list(tools)
    }


def strict(properties: Any) -> dict[str, Any]:
    parameters = {"type": "object", "properties": properties}
    return {"type": "function", "function": {"name": "say", "parameters": parameters}}


def turns(*pairs: tuple[str, str]) -> dict[str, Any]:
    return chat(*({"role": role, "content": text} for role, text in pairs))


CHATS: list[Any] = [
    *(row(n) for n in range(20)),
    row(3),  # duplicate
    row(5, sentence(1005) + " indeed"),  # near_duplicate, contradiction
    "{",  # unreadable
    {"messages": []},  # invalid
    turns(("Human", sentence(90)), ("GPT", sentence(91))),  # invalid, until roles are normalised
    row(21, " "),  # blank_answer
    turns(("user", sentence(30)), ("user", sentence(31)), ("assistant", sentence(32))),  # odd_roles
    turns(("assistant", sentence(33)), ("user", sentence(34)), ("assistant", sentence(35))),  # odd_roles
    turns(("system", "Be brief."), ("assistant", sentence(36))),  # missing_user
    tool_row(40, call(name="whisper")),  # undeclared_tool
    tool_row(41, call('{"text": 5}'), tools=[strict({"text": {"type": "string"}})]),  # tool_arguments
    tool_row(42, call(), tools=[strict({"text": {"type": "strange"}})]),  # tool_schema
    tool_row(43, call(json.dumps(json.dumps({"text": "x"})))),  # double_encoded
    row(44, "ends here <|im_end|> " + sentence(44)),  # special_tokens
    row(45, "cafÃ© " + sentence(45)),  # mixed_encodings
    row(46, "the password: hX7kq92LmZ " + sentence(46)),  # secret
    row(47, "write to bob@firm.org " + sentence(47)),  # personal_data
]
PAIRS = [{"prompt": f"{sentence(n)} ->", "completion": f" {sentence(n + 500)} END"} for n in range(12)]


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LUTHIER_HOME", str(tmp_path / "home"))
    (tmp_path / "my data").mkdir()
    monkeypatch.chdir(tmp_path / "my data")


def run(*words: str) -> int:
    with pytest.raises(SystemExit) as leaving:
        cli.main(list(words))
    return int(leaving.value.code or 0)


def report(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    capsys.readouterr()
    run("data", "check", *words, "--json")
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def kinds(found: dict[str, Any], file: str | None = None) -> set[str]:
    return {each["kind"] for each in found["findings"] if file in (None, each["file"])}


def carry_out(command: str) -> str:
    """The file that a printed line of commands writes at last."""
    made = ""
    for part in command.split(" && "):
        words = shlex.split(part)
        assert words[0] == "luthier"
        made = words[words.index("-o") + 1] if "-o" in words else words[4]
        for name in (Path(made), Path(made).with_name(Path(made).name.replace(".jsonl", ".changes.jsonl"))):
            name.unlink(missing_ok=True)
        assert run(*words[1:]) == 0, part
    return made


def all_mended(capsys: pytest.CaptureFixture[str], *words: str, again: tuple[str, ...] = ()) -> dict[str, Any]:
    """Carry out every proposal for a file, and check that its finding is gone; gives the first report.

    `again`: options of the second check, as the first one's without its files.
    """
    found = report(capsys, *words)
    for each in found["findings"]:
        if each["fix"]:
            left = kinds(report(capsys, carry_out(each["fix"]), *again))
            assert each["kind"] not in left, each["fix"]
        else:
            assert each["kind"] in LOOKED_AT | {"convert", "unknown_key"}, each
    for together in found["fixes"]:
        mended = {each["kind"] for each in found["findings"] if each["fix"] and "data fix" in each["fix"]}
        left = report(capsys, carry_out(together["command"]), *again)
        assert mended & kinds(left) == set() and left["records"]
    return found


def test_conversations(capsys: pytest.CaptureFixture[str]) -> None:
    write(Path("train set.jsonl"), CHATS)
    found = all_mended(capsys, "train set.jsonl")
    assert kinds(found) == {
        *("unreadable", "invalid", "duplicate", "near_duplicate", "contradiction", "blank_answer", "odd_roles"),
        *("missing_user", "missing_system", "undeclared_tool", "tool_arguments", "tool_schema", "double_encoded"),
        *("special_tokens", "mixed_encodings", "secret", "personal_data", "outlier"),
    }
    (together,) = found["fixes"]
    assert "--normalise-roles" in together["command"] and "--dedupe near" in together["command"]


def test_other_keys(capsys: pytest.CaptureFixture[str]) -> None:
    write(Path("a.jsonl"), [row(n) | {"id": n} for n in range(6)])
    found = all_mended(capsys, "a.jsonl")
    assert [(each["kind"], each["fix"]) for each in found["findings"]] == [
        ("unknown_key", "luthier data convert a.jsonl a.converted.jsonl --to chat --drop-extra")
    ]


def test_prompts_and_completions(capsys: pytest.CaptureFixture[str]) -> None:
    odd = [{"prompt": sentence(80), "completion": sentence(81)}]
    write(Path("a.jsonl"), [*PAIRS, *odd])
    assert kinds(all_mended(capsys, "a.jsonl")) == {"separators", "end_markers"}


def test_pairs(capsys: pytest.CaptureFixture[str]) -> None:
    pair = {"prompt": sentence(1), "chosen": sentence(2), "rejected": sentence(3)}
    rows = [pair | {"prompt": sentence(n)} for n in range(10, 16)]
    write(
        Path("a.jsonl"),
        [*rows, pair | {"rejected": sentence(2)}, rows[0], pair | {"chosen": sentence(4) + "<|im_end|>"}],
    )
    found = report(capsys, "a.jsonl")
    assert found["format"] == "preference"
    assert {each["kind"]: each["rows"] for each in found["findings"]} == {
        "pairs": [],
        "same_answers": [7],
        "special_tokens": [9],
        "duplicate": [8],
    }
    for each in found["findings"]:
        if each["kind"] != "pairs":
            assert each["kind"] not in kinds(report(capsys, carry_out(each["fix"])))


def test_what_only_a_model_shows(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [*(row(n) for n in range(6)), row(7, "word " * 300), row(8) | {"messages": row(8)["messages"][::-1]}]
    rows += [turns(("user", "word " * 300), ("assistant", "yes")), row(9, "an end <|im_end|>")]
    write(Path("a.jsonl"), [*rows, tool_row(10, call())])
    words = ("--model", str(model), "--max-length", "200")
    found = all_mended(capsys, "a.jsonl", *words, again=words)
    assert {"too_long", "nothing_supervised", "unrenderable", "special_tokens"} <= kinds(found)
    assert all(str(model) in each["fix"] for each in found["findings"] if each["kind"] == "too_long")


def test_validation_apart_from_training(capsys: pytest.CaptureFixture[str]) -> None:
    write(Path("train.jsonl"), [row(n) for n in range(10)])
    write(Path("more.jsonl"), [row(n) for n in range(10, 14)])
    almost = turns(("user", sentence(11) + "!"), ("assistant", sentence(1011)))
    write(Path("valid.jsonl"), [row(50), row(3, sentence(7000)), almost, row(51)])
    words = ("train.jsonl", "more.jsonl", "--validation")
    found = report(capsys, *words, "valid.jsonl")
    assert kinds(found, "valid.jsonl") == {"overlap", "near_overlap"}
    for each in found["findings"]:
        mended = carry_out(each["fix"])
        assert kinds(report(capsys, *words, mended)) == set()
        assert [json.loads(line) for line in Path(mended).read_text().splitlines()] == [row(50), row(51)]
    changes = [json.loads(line) for line in Path("valid.fixed.changes.jsonl").read_text().splitlines()]
    assert [(change["row"], change["what"], change["detail"]) for change in changes] == [
        (2, "overlap", "has the prompt of row 4 of train.jsonl"),
        (3, "near_overlap", "is almost row 2 of more.jsonl"),
    ]


def test_texts_and_tables(capsys: pytest.CaptureFixture[str]) -> None:
    Path("a.txt").write_text("Write to bob@firm.org.\n" + sentence(1), encoding="utf-8")
    assert kinds(all_mended(capsys, "a.txt")) == {"personal_data"}
    Path("b.csv").write_text('question,answer\n"a, b",c\nd,e\n', encoding="utf-8")
    found = all_mended(capsys, "b.csv")
    assert (found["records"], found["findings"][0]["count"]) == (2, 2)
    Path("c.csv").write_bytes("review;label\n".replace(";", ",").encode() + "l'été très bien,1\n".encode("cp1252") * 3)
    assert "--encoding cp1252" in all_mended(capsys, "c.csv")["findings"][0]["fix"]
    Path("d.csv").write_text("one,two,three\n1,2,3\n", encoding="utf-8")
    (unclear,) = all_mended(capsys, "d.csv")["findings"]
    assert unclear["fix"] is None and "which is the answer" in unclear["details"][0]
    write(Path("e.json"), [{"question": sentence(n), "answer": str(n), "id": n} for n in range(4)])
    (step,) = all_mended(capsys, "e.json")["findings"]
    assert step["fix"].endswith("--to completion --map prompt=question --map completion=answer")


def test_no_command_where_none_would_run(capsys: pytest.CaptureFixture[str]) -> None:
    write(Path("a.jsonl"), [{"messages": []}] * 3)  # nothing would be left
    Path("b.json").write_text(json.dumps([row(0), row(0)])[:-40])  # the rest of an array is lost
    write(Path("c.jsonl"), [{"instruction": "x", "result": "y"}])
    for name in ("a.jsonl", "b.json", "c.jsonl"):
        assert [each["fix"] for each in report(capsys, name)["findings"]] == [None]


def test_each_kind_is_mended_or_looked_at() -> None:
    proposed = {name for name, kind in KINDS.items() if kind.mend} | {"convert", "unknown_key"}
    assert proposed | LOOKED_AT == set(KINDS) and proposed & LOOKED_AT == set()
