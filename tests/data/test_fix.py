"""Mending files: what is asked and nothing else, untouched bytes, a log that tells nothing private."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from luthier.data.choose import DROPPABLE
from luthier.data.doctor import check
from luthier.data.findings import KINDS
from luthier.data.fix import Fixed, Fixes, fix, log_path
from luthier.data.mends import normalise_roles, redact
from luthier.data.render import Renderer
from luthier.spec.errors import BadData, BadSetting, NotFound
from tests.data.test_shared_data import shared

MAIL, KEY, CARD = "jane.roe@acme.io", "sk-abcdefghijklmnopqrstuv12", "4111 1111 1111 1111"


def pair(prompt: str, completion: str, **more: Any) -> dict[str, Any]:
    return {"prompt": prompt, "completion": completion, **more}


def chat(*turns: tuple[str, str]) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": text} for role, text in turns]}


def write(path: Path, rows: Sequence[Any]) -> Path:
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_bytes("".join(f"{line}\n" for line in lines).encode())
    return path


def mended(source: Path, renderer: Renderer | None = None, longest: int | None = None, **fixes: Any) -> Fixed:
    if "drop" in fixes:
        fixes["drop"] = frozenset(fixes["drop"])
    return fix(source, source.with_name("out.jsonl"), Fixes(**fixes), renderer, longest, force=True)


def rows(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def log(source: Path) -> list[dict[str, Any]]:
    return rows(log_path(source.with_name("out.jsonl")))


# -- rows that go ------------------------------------------------------------------------------------------------------


def test_exact_repeats_go_and_the_rest_keeps_its_bytes(tmp_path: Path) -> None:
    lines = [
        '{"prompt":"a" , "completion": "\\u0031"}',
        '{"prompt": "a", "completion": "1"}',
        json.dumps(pair("b", "1")),
    ]
    source = write(tmp_path / "in.jsonl", [lines[0], "", lines[1], lines[2] + "\r", lines[0]])
    done = mended(source, dedupe="exact")
    assert (tmp_path / "out.jsonl").read_bytes() == f"{lines[0]}\n{lines[2]}\r\n".encode()
    assert (done.records, done.rows, done.unchanged, done.dropped) == (4, 2, 2, {"duplicate": 2})
    assert log(source) == [
        {"line": 3, "row": 2, "change": "dropped", "what": "duplicate", "detail": "repeats row 1"},
        {"line": 5, "row": 4, "change": "dropped", "what": "duplicate", "detail": "repeats row 1"},
    ]


def test_near_repeats_go_too(tmp_path: Path) -> None:
    text = (
        "The committee meets on the first Monday of each month in the old town hall, and minutes are kept by the clerk."
    )
    source = write(tmp_path / "in.jsonl", [pair("p", text), pair("p", text + "."), pair("p", text), pair("q", "other")])
    done = mended(source, dedupe="near")
    assert done.dropped == {"duplicate": 1, "near_duplicate": 1}
    assert rows(tmp_path / "out.jsonl") == [pair("p", text), pair("q", "other")]
    assert log(source)[0]["detail"] == "is almost row 1"


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=50)
@given(picked=st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from("xyz")), min_size=1, max_size=20))
def test_dedupe_leaves_each_row_once_and_is_done_at_once(tmp_path: Path, picked: list[tuple[str, str]]) -> None:
    source = write(tmp_path / "in.jsonl", [pair(*each) for each in picked])
    done = mended(source, dedupe="exact")
    assert rows(tmp_path / "out.jsonl") == [pair(*each) for each in dict.fromkeys(picked)]
    assert done.rows + sum(done.dropped.values()) == done.records == len(picked)
    again = write(tmp_path / "in.jsonl", rows(tmp_path / "out.jsonl"))
    assert mended(again, dedupe="exact").unchanged == done.rows


TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "required": ["x"]}}}
BROKEN: dict[str, Any] = {
    "unreadable": '{"messages": [',
    "invalid": {"messages": []},
    "blank_answer": chat(("user", "q"), ("assistant", " ")),
    "missing_user": chat(("assistant", "a")),
    "odd_roles": chat(("user", "q"), ("user", "q"), ("assistant", "a")),
    "special_tokens": chat(("user", "q"), ("assistant", "a<|im_end|>")),
    "secret": chat(("user", KEY), ("assistant", "a")),
    "personal_data": chat(("user", MAIL), ("assistant", "a")),
    "mixed_encodings": chat(("user", "q"), ("assistant", "cafÃ©")),
}
for _kind, _name, _arguments in (
    ("undeclared_tool", "g", "{}"),
    ("tool_arguments", "f", "{}"),
    ("double_encoded", "f", json.dumps(json.dumps({"x": 1}))),
):
    _call = {"id": "c", "type": "function", "function": {"name": _name, "arguments": _arguments}}
    _turns = [{"role": "user", "content": "q"}, {"role": "assistant", "tool_calls": [_call]}]
    BROKEN[_kind] = {"messages": _turns, "tools": [TOOL]}
GOOD = chat(("user", "q"), ("assistant", "a"))


@pytest.mark.parametrize("kind", BROKEN)
def test_each_kind_goes_when_it_is_named_and_only_then(tmp_path: Path, kind: str) -> None:
    source = write(tmp_path / "in.jsonl", [GOOD, BROKEN[kind]])
    reported = {finding.kind: finding.count for finding in check([source]).findings}
    assert reported[kind] == 1
    done = mended(source, drop=[kind])
    assert (done.dropped, rows(tmp_path / "out.jsonl")) == ({kind: 1}, [GOOD])
    (told,) = log(source)
    assert (told["line"], told["change"], told["what"]) == (2, "dropped", kind)
    assert not any(private in json.dumps(told) for private in (KEY[:6], MAIL[:4]))
    if kind != "unreadable":
        other = mended(source, drop=["unreadable"])
        assert (other.dropped, other.rows) == ({}, 2)
        assert other.invalid == (kind == "invalid")


def test_kinds_that_need_tokens(tmp_path: Path, model: Path) -> None:
    renderer = Renderer.load(model)
    long = chat(("user", "q"), ("assistant", "word " * 200))
    hidden = chat(("user", "word " * 200), ("assistant", "a"))
    source = write(tmp_path / "in.jsonl", [GOOD, long, hidden])
    reported = {f.kind: f.count for f in check([source], renderer, max_length=64).findings}
    assert (reported["too_long"], reported["nothing_supervised"]) == (2, 1)
    assert mended(source, renderer, 64, drop=["too_long"]).dropped == {"too_long": 2}
    assert mended(source, renderer, 64, drop=["nothing_supervised"]).dropped == {"nothing_supervised": 1}
    with pytest.raises(BadSetting, match="needs --model"):
        mended(source, drop=["too_long"])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests import tiny

    return tiny.make_tokenizer(tmp_path_factory.mktemp("model"))


def test_kinds_of_files_are_no_kinds_of_rows(tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", [GOOD])
    for kind in ("duplicate", "contradiction", "outlier", "nonsense"):
        with pytest.raises(BadSetting, match=f"--drop {kind}"):
            mended(source, drop=[kind])
    assert {kind for kind, about in KINDS.items() if about.mend.startswith("--drop")} <= set(DROPPABLE)


# -- texts that change -------------------------------------------------------------------------------------------------


def test_what_is_private_is_nowhere_afterwards(tmp_path: Path) -> None:
    arguments = json.dumps({"to": MAIL, "note": 'say "hi"'})
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": arguments}}
    private = {
        "messages": [
            {"role": "user", "content": f"I am {MAIL}, card {CARD}."},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "c", "content": KEY},
            {"role": "assistant", "content": "done"},
        ],
        "owner": MAIL,
    }
    source = write(tmp_path / "in.jsonl", [private, GOOD])
    done = mended(source, redact=True)
    assert (done.changed, done.unchanged) == ({"redacted": 1}, 1)
    changed, same = rows(tmp_path / "out.jsonl")
    assert same == GOOD and (tmp_path / "out.jsonl").read_bytes().splitlines()[1] == source.read_bytes().splitlines()[1]
    assert changed["messages"][0]["content"] == "I am [e-mail address], card [card number]."
    assert json.loads(changed["messages"][1]["tool_calls"][0]["function"]["arguments"]) == {
        "to": "[e-mail address]",
        "note": 'say "hi"',
    }
    assert (changed["messages"][2]["content"], changed["owner"]) == ("[API key]", "[e-mail address]")
    told = (tmp_path / "out.changes.jsonl").read_text() + (tmp_path / "out.jsonl").read_text()
    assert not any(private in told for private in (MAIL, KEY, CARD, "jane", "4111"))
    assert Counter((line["field"], line["what"]) for line in log(source)) == {
        ("messages[0].content", "e-mail address"): 1,
        ("messages[0].content", "card number"): 1,
        ("messages[1].tool_calls[0].function.arguments.to", "e-mail address"): 1,
        ("messages[2].content", "API key"): 1,
        ("owner", "e-mail address"): 1,
    }
    assert not any("before" in line for line in log(source))  # a hash of a short text gives it away
    again = write(tmp_path / "in.jsonl", rows(tmp_path / "out.jsonl"))
    assert {f.kind for f in check([again]).findings} & {"secret", "personal_data"} == set()
    assert mended(again, redact=True).changed == {}


@given(
    st.recursive(
        st.none() | st.integers() | st.text(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)
    )
)
def test_texts_with_nothing_private_stay(value: Any) -> None:
    made, changes = redact(value)
    assert made == value or changes


def test_roles_get_their_usual_names(tmp_path: Path) -> None:
    odd = chat(("System", "s"), ("Human", "a"), ("user", "b"), ("GPT", "c"), ("assistant", "d"), ("user", "e"))
    source = write(tmp_path / "in.jsonl", [GOOD, odd])
    done = mended(source, normalise_roles=True)
    assert rows(tmp_path / "out.jsonl")[1] == chat(("system", "s"), ("user", "a\n\nb"), ("assistant", "c\n\nd"))
    assert (done.changed, done.invalid, done.unchanged) == ({"joined": 1, "removed": 1, "role": 1}, 0, 1)
    assert [line["field"] for line in log(source)] == [
        *(f"messages[{n}].role" for n in (0, 1, 3)),
        "messages[2]",
        "messages[4]",
        "messages[3]",
    ]
    assert all(len(line["before"]) == len(line["after"]) == 16 for line in log(source))


def test_turns_that_differ_in_more_than_words_stay_apart() -> None:
    for more in ({"weight": 0}, {"name": "x"}):
        value = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
        value["messages"].append({"role": "assistant", "content": "b", **more})  # type: ignore[dict-item]
        assert normalise_roles(value) == (value, [])
    assert normalise_roles({"prompt": "p"}) == ({"prompt": "p"}, [])
    assert normalise_roles({"messages": [{"role": "stranger", "content": "q"}]})[1] == []


def test_endings_of_most_rows_are_given_to_the_others(tmp_path: Path) -> None:
    given_rows = [pair(f"p{n} ->", f" c{n} END") for n in range(9)] + [pair("q", "d")]
    source = write(tmp_path / "in.jsonl", given_rows)
    fixes = [finding.fix or "" for finding in check([source]).findings]
    assert any("--add-separators" in each for each in fixes) and any("--add-end-markers" in each for each in fixes)
    done = mended(source, add_separators=True, add_end_markers=True)
    assert rows(tmp_path / "out.jsonl") == [*given_rows[:9], pair("q ->", " d END")]
    assert (done.unchanged, done.changed) == (9, {"ending": 1, "space": 1})
    kinds = {f.kind for f in check([tmp_path / "out.jsonl"]).findings}
    assert kinds & {"separators", "end_markers"} == set()


def test_endings_that_stand_in_no_text_where_there_is_none(tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", [pair(f"p ->\n{n}", f"c{n}") for n in range(3)])
    done = mended(source, add_separators=True, add_end_markers=True)
    assert done.endings == {"prompt": "\n\n###\n\n", "completion": " END"}
    assert rows(tmp_path / "out.jsonl")[0] == pair("p ->\n0\n\n###\n\n", "c0 END")
    chats = write(tmp_path / "chat.jsonl", [GOOD])
    with pytest.raises(BadSetting, match=r"is for completion records, and .* holds chat records"):
        mended(chats, add_separators=True)
    with pytest.raises(BadSetting, match="is for chat records"):
        mended(source, normalise_roles=True)


# -- the file ----------------------------------------------------------------------------------------------------------


def test_a_split_after_the_mends(tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", [pair(f"p{n}", "c") for n in range(20)] * 2)
    done = mended(source, dedupe="exact", validation=tmp_path / "v.jsonl", share=0.25, seed=3)
    assert done.split and (done.split.train.rows, done.split.validation.rows) == (15, 5)
    assert (len(rows(tmp_path / "out.jsonl")), len(rows(tmp_path / "v.jsonl"))) == (15, 5)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out.changes.jsonl", "out.jsonl", "v.jsonl"]


def test_what_cannot_be_read_is_not_lost(tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", [GOOD, '{"messages": [', {"messages": []}])
    with pytest.raises(BadData, match="1 rows cannot be read") as refusal:
        mended(source, dedupe="exact")
    assert "--drop unreadable" in (refusal.value.hint or "") and not (tmp_path / "out.jsonl").exists()
    assert mended(source, dedupe="exact", drop=["unreadable"]).invalid == 1
    with pytest.raises(BadData, match="cannot be split"):
        mended(source, drop=["unreadable"], validation=tmp_path / "v.jsonl")
    array = tmp_path / "in.json"
    array.write_text('[{"prompt": "a", "completion": "b"}, {"prompt": }, {"prompt": "c", "completion": "d"}]')
    with pytest.raises(BadData, match="the rest of the file cannot be read"):
        mended(array, drop=["unreadable"])


def test_an_array_keeps_the_layout_of_its_elements(tmp_path: Path) -> None:
    source = tmp_path / "in.json"
    element = '{\n  "prompt": "a",\n  "completion": "b"\n}'
    source.write_text(f"[{element}, {element},{json.dumps(pair(MAIL, 'x'))}]")
    mended(source, dedupe="exact", redact=True)
    changed = json.dumps(pair("[e-mail address]", "x"))
    assert (tmp_path / "out.jsonl").read_text() == f"[\n{element},\n{changed}\n]\n"


def test_nothing_is_done_unasked(tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", [GOOD, GOOD])
    with pytest.raises(BadSetting, match="No fix was chosen"):
        mended(source)
    with pytest.raises(NotFound):
        mended(tmp_path / "none.jsonl", dedupe="exact")
    with pytest.raises(BadData, match=r"No row of .* would be left"):
        mended(write(tmp_path / "b.jsonl", [BROKEN["secret"]]), drop=["secret"])
    (tmp_path / "t.txt").write_text("text")
    with pytest.raises(BadData, match="one document"):
        mended(tmp_path / "t.txt", redact=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b.jsonl", "in.jsonl", "t.txt"]


# -- real files --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "repeats"),
    [
        ("self_llm_huanhuan/huanhuan.json", 112),
        ("llama_factory/alpaca_en_demo.json", 14),
        ("llama_factory/alpaca_zh_demo.json", 8),
        ("openai/drone_training.jsonl", 0),
    ],
)
def test_what_the_report_counts_is_what_goes(tmp_path: Path, name: str, repeats: int) -> None:
    source = shared(name)
    reported = {finding.kind: finding.count for finding in check([source]).findings}
    done = fix(source, tmp_path / "out.json", Fixes("near"))
    assert done.dropped == {kind: reported[kind] for kind in ("duplicate", "near_duplicate") if reported.get(kind)}
    assert done.dropped.get("duplicate", 0) == repeats
    left = {finding.kind for finding in check([tmp_path / "out.json"]).findings}
    assert "duplicate" not in left


def test_preferences_are_deduped(tmp_path: Path) -> None:
    done = fix(shared("llama_factory/dpo_en_demo.json"), tmp_path / "o.json", Fixes("exact"))
    assert (done.records, done.rows, done.dropped) == (99, 98, {"duplicate": 1})  # one pair is there twice
