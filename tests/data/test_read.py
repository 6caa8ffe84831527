"""Bytes -> records: encodings, line ends, strict JSON, huge lines, arrays, plain text."""

from __future__ import annotations

import codecs
import hashlib
import json
import os
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from luthier.data import read
from luthier.data.read import Record, hash_file, read_records
from luthier.spec.data import Problem
from luthier.spec.errors import NotFound

WORDS = ["alpha", "bravo", "caf\u00e9", "delta", "echo"]


def write(folder: Path, data: bytes | str, name: str = "rows.jsonl") -> Path:
    path = folder / name
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


def read_all(path: Path) -> tuple[list[tuple[int, int, Any]], list[Problem]]:
    found = list(read_records(path))
    good = [(item.line, item.row, item.value) for item in found if isinstance(item, Record)]
    return good, [item for item in found if isinstance(item, Problem)]


def one_problem(path: Path) -> Problem:
    found = list(read_records(path))
    assert len(found) == 1 and isinstance(found[0], Problem), found
    assert found[0].file == path.name and found[0].severity == "error"
    return found[0]


def five_rows(line_end: str = "\n") -> str:
    return "".join(json.dumps({"text": word}, ensure_ascii=False) + line_end for word in WORDS)


@pytest.mark.parametrize(
    "data",
    [
        five_rows().encode(),
        codecs.BOM_UTF8 + five_rows().encode(),
        five_rows("\r\n").encode(),
        five_rows().encode().rstrip(b"\n"),
        five_rows("\r\n").encode().rstrip(),
        json.dumps([{"text": word} for word in WORDS]).encode(),
    ],
    ids=["utf-8", "bom", "crlf", "no final newline", "crlf, no final newline", "array"],
)
def test_five_rows_whatever_the_line_ends(tmp_path: Path, data: bytes) -> None:
    good, problems = read_all(write(tmp_path, data))
    assert problems == []
    assert [value["text"] for _, _, value in good] == WORDS
    assert [row for _, row, _ in good] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("codec", "mark", "name"),
    [
        ("utf-16-le", codecs.BOM_UTF16_LE, "UTF-16"),
        ("utf-16-be", codecs.BOM_UTF16_BE, "UTF-16"),
        ("utf-32-le", codecs.BOM_UTF32_LE, "UTF-32"),
        ("utf-32-be", codecs.BOM_UTF32_BE, "UTF-32"),
        ("utf-16-le", b"", "UTF-16"),
        ("utf-16-be", b"", "UTF-16"),
        ("utf-32-le", b"", "UTF-32"),
        ("utf-32-be", b"", "UTF-32"),
    ],
)
@pytest.mark.parametrize("suffix", [".jsonl", ".txt"])
def test_wide_encodings_are_named(tmp_path: Path, codec: str, mark: bytes, name: str, suffix: str) -> None:
    problem = one_problem(write(tmp_path, mark + five_rows().encode(codec), "rows" + suffix))
    assert (problem.found, problem.wanted) == (f"{name} text", "UTF-8 text")
    assert "UTF-8" in problem.hint and problem.row == 0


def test_a_byte_of_another_encoding_costs_its_line_only(tmp_path: Path) -> None:
    good, problems = read_all(write(tmp_path, five_rows().encode("cp1252")))
    assert [value["text"] for _, _, value in good] == ["alpha", "bravo", "delta", "echo"]
    (problem,) = problems
    assert (problem.line, problem.row) == (3, 3)
    offset = five_rows().encode("cp1252").index(b"\xe9")
    assert problem.found == f"byte 0xE9 at offset {offset}, which is not UTF-8"
    assert "iconv" in problem.hint


def test_offset_counts_the_bom(tmp_path: Path) -> None:
    data = codecs.BOM_UTF8 + b'{"a": "\xff"}\n'
    assert "0xFF at offset 10," in one_problem(write(tmp_path, data)).found
    data = codecs.BOM_UTF8 + b'[{"a": "\xff"}]\n'
    assert "0xFF at offset 11," in one_problem(write(tmp_path, data)).found


def test_the_locale_plays_no_part(tmp_path: Path) -> None:
    path = write(tmp_path, five_rows())
    code = (
        "import sys; from pathlib import Path; from luthier.data.read import read_records\n"
        "print(ascii([item.value['text'] for item in read_records(Path(sys.argv[1]))]))"
    )
    source = str(Path(read.__file__).parents[2])
    environment = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONPATH": source}
    done = subprocess.run([sys.executable, "-c", code, str(path)], env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == ascii(WORDS), done.stderr


def test_blank_lines_count_as_lines_and_not_as_rows(tmp_path: Path) -> None:
    good, problems = read_all(write(tmp_path, '\n{"a": 1}\n\n \t\r\n{"a": 2}\n\n'))
    assert good == [(2, 1, {"a": 1}), (5, 2, {"a": 2})]
    assert problems == []


def test_only_newline_ends_a_line(tmp_path: Path) -> None:
    text = "a\u2028b\u2029c\x85d"
    good, problems = read_all(write(tmp_path, json.dumps({"t": text}, ensure_ascii=False) + '\n{"t": "e"}'))
    assert problems == []
    assert good == [(1, 1, {"t": text}), (2, 2, {"t": "e"})]


@pytest.mark.parametrize("text", ["\U0001f469\u200d\U0001f680", "\u6f22\u5b57", "e\u0301", "nul \x00 \x0b\x0c"])
@pytest.mark.parametrize("ascii_only", [True, False])
def test_text_survives(tmp_path: Path, text: str, ascii_only: bool) -> None:
    good, problems = read_all(write(tmp_path, json.dumps({"t": text}, ensure_ascii=ascii_only) + "\n"))
    assert problems == []
    assert good == [(1, 1, {"t": text})]


@pytest.mark.parametrize(
    ("data", "found"),
    [(b"", "no bytes at all"), (b"\n \r\n", "nothing but blank lines"), (codecs.BOM_UTF8, "nothing but blank lines")],
)
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.txt", "a"])
def test_empty_files(tmp_path: Path, data: bytes, found: str, name: str) -> None:
    problems = read_all(write(tmp_path, data, name))[1]
    assert [(problem.line, problem.found, problem.wanted) for problem in problems] == [
        (0, found, "at least one record")
    ]


def test_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match=r"nowhere\.jsonl cannot be opened"):
        next(read_records(tmp_path / "nowhere.jsonl"))
    with pytest.raises(NotFound):
        next(read_records(tmp_path))


STRICT = [
    ('{"a": 1,}', "a trailing comma before } at column 9"),
    ('{"a": [1,]}', "a trailing comma before ] at column 10"),
    ("{'a': 1}", "a single quote, \"'a': 1}\" at column 2"),
    ('{"a": 1, "b": {"c": 2, "c": 3}}', "the key 'c' twice in one object at column 24"),
    ('{"a": 1, "\\u0061": 2}', "the key 'a' twice in one object at column 10"),
    ('{"NaN": NaN}', "the literal NaN at column 9"),
    ('{"a": -Infinity}', "the literal -Infinity at column 7"),
    ('{"a": 1e999}', "the number '1e999', out of range at column 7"),
    ('{"a": None}', "the Python word 'None}' at column 7"),
    ('{"a": "x', "a string that does not end, '\"x' at column 7"),
    ('{"a": "x\ty"}', "a raw control character, '\\ty\"}' at column 9"),
    ('{"a": "\\x"}', "a wrong escape, '\\\\x\"}' at column 8"),
    ('{"a": ', "the end of the text at column 6"),
    ('{"a": 1} {"a": 2}', "more after the end of the value, '{\"a\": 2}' at column 10"),
    ('{"a" 1}', "'1}' at column 6"),
    ('\ufeff{"a": 1}', "a byte-order mark at column 1"),
    ("[" * 101 + "]" * 101, "more than 100 levels of nesting"),
    ("[" * 100_000 + "]" * 100_000, "more than 100 levels of nesting"),
    ('{"a": ' + "9" * 5000 + "}", "the number '999999999999999999999999'..., out of range at column 7"),
]


@pytest.mark.parametrize(("bad", "found"), STRICT, ids=[found for _, found in STRICT])
def test_strict_json_costs_the_line_only(tmp_path: Path, bad: str, found: str) -> None:
    good, problems = read_all(write(tmp_path, f'{{"a": 0}}\n{bad}\n{{"a": 9}}\n'))
    assert good == [(1, 1, {"a": 0}), (3, 3, {"a": 9})]
    assert [(problem.line, problem.row, problem.found) for problem in problems] == [(2, 2, found)]
    assert problems[0].wanted


def test_nesting_up_to_the_limit(tmp_path: Path) -> None:
    deep = "[" * 99 + "]" * 99
    good, problems = read_all(write(tmp_path, f'{{"a": {deep}}}\n'))
    assert problems == [] and len(good) == 1
    wide = json.dumps({"a": [[] for _ in range(500)]})
    assert read_all(write(tmp_path, wide))[1] == []


@pytest.mark.parametrize(
    ("value", "field"),
    [
        ('{"messages": [{"role": "user", "content": "half \\ud83d"}]}', "messages[0].content"),
        ('{"text": "\\uDE00 half"}', "text"),
        ('{"a": {"\\ud800": 1}}', "a (a key)"),
    ],
)
def test_lone_surrogates_are_found_by_field(tmp_path: Path, value: str, field: str) -> None:
    for data in (value, f'[{{"a": 1}}, {value}, {{"a": 2}}]'):
        good, problems = read_all(write(tmp_path, data))
        assert [(problem.field, problem.found[:24]) for problem in problems] == [(field, "half of a surrogate pair")]
        assert len(good) == (0 if data == value else 2)


def test_escaped_pairs_and_escaped_backslashes_are_whole(tmp_path: Path) -> None:
    good, problems = read_all(write(tmp_path, '{"t": "\\ud83d\\ude00 \\\\ud83d"}\n'))
    assert problems == [] and good[0][2] == {"t": "\U0001f600 \\ud83d"}


def test_one_huge_line_between_two_rows(tmp_path: Path) -> None:
    path = tmp_path / "huge.jsonl"
    with open(path, "wb") as handle:
        handle.write(b'{"text": "first"}\n{"text": "')
        for _ in range(60):
            handle.write(b"x" * 1_000_000)
        handle.write(b'"}\n{"text": "last"}\n')
    tracemalloc.start()
    good, problems = read_all(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert good == [(1, 1, {"text": "first"}), (3, 3, {"text": "last"})]
    assert [(p.line, p.row, p.found, p.wanted) for p in problems] == [
        (2, 2, "a line of 60,000,013 bytes", "at most 33,554,432 bytes a line")
    ]
    assert peak < 45_000_000  # the limit and some, never the line


def test_line_limit_is_exact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(read, "MAX_RECORD", 20)
    monkeypatch.setattr(read, "_CHUNK", 8)
    fits, over = json.dumps("x" * 18), json.dumps("x" * 19)
    path = write(tmp_path, f'{{"a": 1}}\n{fits}\n{over}\n{fits}\n{over}')
    good, problems = read_all(path)
    assert [line for line, _, _ in good] == [1, 2, 4]
    assert [(p.line, p.found) for p in problems] == [(3, "a line of 22 bytes"), (5, "a line of 21 bytes")]


def test_sixty_megabytes_stream_in_little_memory(tmp_path: Path) -> None:
    row = json.dumps({"messages": [{"role": "user", "content": "word " * 190}]})
    lines, array, text = tmp_path / "a.jsonl", tmp_path / "a.json", tmp_path / "a.txt"
    count = 60_000_000 // len(row)
    lines.write_text(f"{row}\n" * count)
    array.write_text("[" + f"{row},\n" * (count - 1) + row + "]")
    text.write_text(f"{row}\n" * count)
    for path in (lines, array, text):
        tracemalloc.start()
        rows = sum(isinstance(item, Record) for item in read_records(path))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert rows == count or path is text
        assert peak < 8_000_000, path.name


# --- arrays and pretty-printed objects -------------------------------------------------------------------------


def test_array_elements_have_their_physical_lines(tmp_path: Path) -> None:
    good, problems = read_all(write(tmp_path, '\n[\n  {"a": 1},\n\n  {\n "a": 2\n}, {"a": 3}\n]\n', "a.json"))
    assert problems == []
    assert good == [(3, 1, {"a": 1}), (5, 2, {"a": 2}), (7, 3, {"a": 3})]


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a"])
def test_content_decides_and_not_the_suffix(tmp_path: Path, name: str) -> None:
    assert [v for _, _, v in read_all(write(tmp_path, '[{"a": 1}]', name))[0]] == [{"a": 1}]
    assert [v for _, _, v in read_all(write(tmp_path, '{"a": 1}\n{"a": 2}', name))[0]] == [{"a": 1}, {"a": 2}]


@pytest.mark.parametrize("indent", [1, 2, "\t"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_pretty_printed_objects(tmp_path: Path, indent: int | str, end: str) -> None:
    value = {"messages": [{"role": "user", "content": "a"}], "tools": []}
    one = json.dumps(value, indent=indent).replace("\n", end)
    assert read_all(write(tmp_path, one)) == ([(1, 1, value)], [])
    height = one.count("\n") + 1
    assert read_all(write(tmp_path, one + end + one)) == ([(1, 1, value), (1 + height, 2, value)], [])


def test_a_row_that_was_cut_off_does_not_hide_the_others(tmp_path: Path) -> None:
    good, problems = read_all(write(tmp_path, '{"a": [\n{"a": 2}\n{"a": 3}\n'))
    assert [(p.line, p.found) for p in problems] == [(1, "the end of the text at column 8")]
    assert good == [(2, 2, {"a": 2}), (3, 3, {"a": 3})]


def test_a_raw_line_break_in_a_string_costs_its_lines_only(tmp_path: Path) -> None:
    good, problems = read_all(write(tmp_path, '{"a": "one\ntwo"}\n{"a": 3}\n'))
    assert [p.line for p in problems] == [1, 2]
    assert good == [(3, 3, {"a": 3})]


ARRAYS = [
    ('[{"a": 1},\n{"a": 2,}]', 1, 2, 2, "a trailing comma before } at column 9"),
    ('[{"a": 1},\n]', 1, 2, 1, "']' at column 1"),
    ('[{"a": 1}\n {"a": 2}]', 1, 2, 1, "'{\"a\": 2}]' at column 2"),
    ('[{"a": 1}]\n{"a": 2}', 1, 2, 1, "'{\"a\": 2}' at column 1"),
    ('[{"a": 1},\n', 1, 2, 1, "the end of the file"),
    ('[{"a": 1},\n{"a', 1, 2, 2, "a string that does not end, '\"a' at column 2"),
    ('[{"a": 1},\n{"a":', 1, 2, 2, "the end of the text at column 6"),
    ("[{'a': 1}]", 0, 1, 1, "a single quote, \"'a': 1}]\" at column 3"),
    ("[]", 0, 0, 0, "an empty array"),
]


@pytest.mark.parametrize(("data", "count", "line", "row", "found"), ARRAYS, ids=[array[-1] for array in ARRAYS])
def test_a_syntax_error_ends_an_array(tmp_path: Path, data: str, count: int, line: int, row: int, found: str) -> None:
    good, problems = read_all(write(tmp_path, data, "a.json"))
    assert len(good) == count
    assert [(p.line, p.row, p.found) for p in problems] == [(line, row, found)]


def test_a_wrong_value_does_not_end_an_array(tmp_path: Path) -> None:
    data = '[{"a": 1, "a": 2},\n{"a": NaN},\n{"a": 1e400}, {"a": 4},\n{"a": "\\ud800"}, {"a": 6}]'
    good, problems = read_all(write(tmp_path, data))
    assert good == [(3, 4, {"a": 4}), (4, 6, {"a": 6})]
    assert [(p.line, p.row) for p in problems] == [(1, 1), (2, 2), (3, 3), (4, 5)]
    assert [p.found.partition(" at ")[2] for p in problems[:3]] == ["column 11", "column 7", "column 7"]


@pytest.mark.parametrize("after", ["}, {}]", ", {}]", ""])
def test_a_wrong_byte_ends_an_array_after_what_came_before(tmp_path: Path, after: str) -> None:
    data = b'[{"a": 1},\n{"a": 2},\n{"a": "\xe9"' + after.encode()
    good, problems = read_all(write(tmp_path, data))
    assert [value["a"] for _, _, value in good] == [1, 2]
    assert [(p.line, p.row, p.found) for p in problems] == [(3, 3, "byte 0xE9 at offset 28, which is not UTF-8")]


def test_an_element_over_the_limit_ends_an_array(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(read, "MAX_RECORD", 1000)
    monkeypatch.setattr(read, "_CHUNK", 64)
    data = '[{"a": 1},\n{"a": "' + "x" * 5000 + '"}, {"a": 3}]'
    good, problems = read_all(write(tmp_path, data))
    assert good == [(1, 1, {"a": 1})]
    assert [(p.line, p.row, p.found) for p in problems] == [
        (2, 2, "a record of more than 1,000 characters at column 1")
    ]


@given(
    st.lists(
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
            lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
            max_leaves=8,
        ),
        min_size=1,
        max_size=8,
    ),
    st.sampled_from([None, 1]),
    st.booleans(),
    st.integers(1, 9),
)
@settings(deadline=None, max_examples=150)
def test_any_array_in_pieces_of_any_size(
    tmp_path_factory: pytest.TempPathFactory, values: list[Any], indent: int | None, ascii_only: bool, chunk: int
) -> None:
    folder = tmp_path_factory.mktemp("array")
    path = write(folder, json.dumps(values, indent=indent, ensure_ascii=ascii_only), "a.json")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(read, "_CHUNK", chunk)
        good, problems = read_all(path)
    assert problems == []
    assert [value for _, _, value in good] == values
    path = write(folder, "".join(json.dumps({"v": v}, ensure_ascii=ascii_only) + "\n" for v in values))
    assert [value["v"] for _, _, value in read_all(path)[0]] == values


# --- plain text, other files, helpers ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "one line",
        "a\r\nb\r\n",
        "line of words\n" * 20_000,
        "x" * 200_000,
        "\u6f22" * 65_535 + "\n" + "\U0001f600" * 70_000 + "\nend",
        "y" * 65_536,
        "y" * 65_535 + "\n" + "z",
    ],
)
@pytest.mark.parametrize("mark", [b"", codecs.BOM_UTF8])
def test_plain_text_is_cut_and_never_changed(tmp_path: Path, text: str, mark: bytes) -> None:
    good, problems = read_all(write(tmp_path, mark + text.encode(), "a.TXT"))
    assert problems == []
    assert "".join(value for _, _, value in good) == text
    assert all(0 < len(value) <= 65_536 for _, _, value in good)
    assert [row for _, row, _ in good] == list(range(1, len(good) + 1))
    done = 0
    for line, _, value in good:
        assert line == text.count("\n", 0, done) + 1
        done += len(value)
        assert value.endswith("\n") or done == len(text) or "\n" not in value


def test_plain_text_that_is_not_utf8(tmp_path: Path) -> None:
    problem = read_all(write(tmp_path, b"one\ntwo\ncaf\xe9\n", "a.txt"))[1]
    assert [(p.line, p.found) for p in problem] == [(3, "byte 0xE9 at offset 11, which is not UTF-8")]


@pytest.mark.parametrize(
    ("data", "name", "found"),
    [
        (b"\x1f\x8b\x08\x00rest", "a.jsonl", "a gzip file"),
        (b"PK\x03\x04rest", "a.xlsx", "a zip (or Excel) file"),
        (b"PAR1rest", "a.parquet", "a Parquet file"),
        (b"label,review\n1,good\n", "a.csv", "a file that begins with 'label,review\\n1,good\\n'"),
    ],
)
def test_other_kinds_of_file_are_named(tmp_path: Path, data: bytes, name: str, found: str) -> None:
    assert one_problem(write(tmp_path, data, name)).found == found


def test_jsonl_that_begins_wrongly_is_still_read_by_line(tmp_path: Path) -> None:
    good, problems = read_all(write(tmp_path, '# comment\n{"a": 1}\n'))
    assert good == [(2, 2, {"a": 1})]
    assert [(p.line, p.found) for p in problems] == [(1, "'# comment' at column 1")]


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt"])
def test_progress_grows_to_the_size(tmp_path: Path, name: str) -> None:
    path = write(tmp_path, '{"text": "abcdefgh"}\n' * 100_000, name)
    told: list[tuple[int, int]] = []
    for _ in read_records(path, lambda done, total: told.append((done, total))):
        pass
    size = path.stat().st_size
    assert told[-1] == (size, size) and {total for _, total in told} == {size}
    assert told == sorted(told) and 4 <= len(told) <= 10


def test_hash_file(tmp_path: Path) -> None:
    path = write(tmp_path, b"abc" * 1_000_000)
    assert hash_file(path) == hashlib.sha256(b"abc" * 1_000_000).hexdigest()
    with pytest.raises(NotFound):
        hash_file(tmp_path / "nowhere")
