"""Makes the generated part of the general probe: arithmetic and format items, the same on every machine.

`python -m luthier.proof.made FOLDER` writes arithmetic.jsonl and format.jsonl there; a test holds the packaged files
against it. The other files of the probe are written by hand. Does not know: models, how an item is scored.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from luthier.spec.run import write_whole

Item = dict[str, Any]
SEED = 20240501
NAMES = ("Anna", "Ben", "Clara", "David", "Emma", "Frank", "Grace", "Henry", "Iris", "Jack", "Karen", "Leo")
CITIES = ("Oslo", "Rome", "Lima", "Cairo", "Delhi", "Paris", "Quito", "Tokyo", "Seoul", "Accra", "Bern", "Riga")
NAMES_ZH = ("王芳", "李明", "张伟", "刘洋", "陈静", "杨帆", "赵磊", "黄丽")
CITIES_ZH = ("北京", "上海", "广州", "杭州", "成都", "西安", "南京", "武汉")
PHRASES = (
    "good morning", "the river is wide", "open the window", "ten small boats", "a cup of tea", "winter is coming soon",
    "my blue bicycle", "read this book", "seven green apples", "the last train", "happy birthday", "a quiet street",
)  # fmt: skip
LISTS = (
    ("apple", "pear", "plum"), ("red", "green", "blue"), ("north", "south", "west"), ("tea", "milk", "water"),
    ("dog", "cat", "horse"), ("spring", "summer", "winter"), ("pen", "book", "lamp"), ("rain", "snow", "wind"),
)  # fmt: skip
LISTS_ZH = (
    ("苹果", "香蕉", "西瓜"), ("红色", "绿色", "蓝色"), ("春天", "夏天", "冬天"), ("米饭", "面条", "饺子"),
    ("狗", "猫", "马"), ("桌子", "椅子", "床"),
)  # fmt: skip


def arithmetic() -> list[Item]:
    """Sums with four answers to choose from, the wrong ones near the right one."""
    rng = random.Random(SEED)
    items: list[Item] = []
    for left, sign, right, language in _sums(rng):
        value = {"+": left + right, "-": left - right, "x": left * right}[sign]
        choices = _near(rng, value)
        items.append(
            {
                "id": f"arit-{language}-{len(items) + 1:03}",
                "kind": "arithmetic",
                "language": language,
                "query": _question(left, sign, right, language),
                "choices": [str(choice) for choice in choices],
                "gold": choices.index(value),
            }
        )
    return items


def _sums(rng: random.Random) -> Iterator[tuple[int, str, int, str]]:
    easy = [(a, "+", b) for a in range(1, 10) for b in range(1, 10)]
    tens = [(10 * a, "+", 10 * b) for a in range(1, 9) for b in range(1, 9)]
    minus = [(a, "-", b) for a in range(3, 15) for b in range(1, a)]
    times = [(a, "x", b) for a in range(2, 10) for b in range(2, 10)]
    for sums, count in ((easy, 24), (tens, 16), (minus, 20), (times, 20)):
        for left, sign, right in rng.sample(sums, count):
            yield left, sign, right, "en"
    small = [(a, "+", b) for a in range(1, 9) for b in range(1, 9) if a + b <= 10]
    for left, sign, right in rng.sample(small, 24):
        yield left, sign, right, "zh"
    for left, sign, right in rng.sample([(a, "-", b) for a in range(2, 11) for b in range(1, a)], 16):
        yield left, sign, right, "zh"


def _question(left: int, sign: str, right: int, language: str) -> str:
    if language == "zh":
        word = {"+": "加", "-": "减"}[sign]
        return f"1加1等于2。5减3等于2。4加2等于6。{left}{word}{right}等于"
    word = {"+": "+", "-": "-", "x": "*"}[sign]
    return f"1 + 1 = 2\n5 - 3 = 2\n4 * 2 = 8\n{left} {word} {right} ="


def _near(rng: random.Random, value: int) -> list[int]:
    """The value and three others that lie near it and have as many digits, since likelihoods are taken per byte."""
    around = [other for other in range(max(0, value - 9), value + 10) if len(str(other)) == len(str(value))]
    choices = [value, *rng.sample([other for other in around if other != value], 3)]
    rng.shuffle(choices)
    return choices


def formats() -> list[Item]:
    """Answers whose shape can be checked: JSON, lists, capitals, marks around a word."""
    items: list[Item] = []
    for language, prompt, check in _asked():
        number = f"{len(items) + 1:03}"
        item = {"id": f"form-{language}-{number}", "kind": "format", "language": language}
        items.append({**item, "prompt": prompt, "check": check})
    return items


def _asked() -> Iterator[tuple[str, str, dict[str, Any]]]:
    for index, (name, city) in enumerate(zip(NAMES, CITIES, strict=True)):
        age = 20 + 3 * index
        asked = f"{name} is {age} and lives in {city}. Write only the JSON."
        prompt = f'Write this as a JSON object with the keys "name", "age" and "city": {asked}'
        yield "en", prompt, {"json": {"name": name, "age": age, "city": city}}
    for name, city in zip(NAMES_ZH, CITIES_ZH, strict=True):
        example = '{"name": "小林", "city": "天津"}'
        prompt = f"把句子写成 JSON。\n小林住在天津。\n{example}\n只写 JSON，不要写别的。\n{name}住在{city}。"
        yield "zh", prompt, {"json_within": {"name": name, "city": city}}
    for words in LISTS:
        yield "en", f"Write these words as a JSON list: {', '.join(words)}. Write only the list.", {"json": list(words)}
        yield "en", f"Write these words as a list with one word on each line: {', '.join(words)}.", {"lines": words}
        yield "en", f"Join these words with commas: {' '.join(words)}", {"equals": ", ".join(words)}
    for words in LISTS_ZH:
        joined = "、".join(words)
        yield (
            "zh",
            f'把词写成 JSON 列表。\n山、水、云\n["山", "水", "云"]\n只写列表。\n{joined}',
            {"json_within": list(words)},
        )
        yield "zh", f"把下面的词写成列表，每行一个词，不要写别的：\n{joined}", {"lines": words}
    for phrase in PHRASES[:8]:
        yield "zh", f"请把下面的英文改成大写字母：{phrase}", {"equals_case": phrase.upper()}
    for phrase in PHRASES:
        yield "en", f"Write this in capital letters: {phrase}", {"equals_case": phrase.upper()}
    for phrase in PHRASES:
        yield "en", f"Put this between double quotes: {phrase}", {"equals": f'"{phrase}"'}


def write(folder: Path) -> None:
    """Write both files into `folder`."""
    for name, items in (("arithmetic", arithmetic()), ("format", formats())):
        lines = [json.dumps(item, ensure_ascii=False) + "\n" for item in items]
        write_whole(folder / f"{name}.jsonl", "".join(lines))


if __name__ == "__main__":
    write(Path(sys.argv[1]))
