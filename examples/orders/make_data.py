"""Writes the demo's data set: messages to a small shop, each with the order record that it comes to.

    python examples/orders/make_data.py --out DIR [--train 720] [--held-out 60] [--seed 7]

makes DIR/train.jsonl and DIR/held-out.jsonl, OpenAI chat rows. Every word comes from the lists below, so the data is
free of anybody else's rights. No order record and no message is in both files, or twice in one. The held-out rows
depend on the seed and their own number only: asking for more training rows leaves the exam as it was.

Does not know: Luthier. Standard library only, so that it is also a pattern for a generator of your own.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any

SYSTEM = "Write the order as one line of JSON: item, quantity, size, deliver. Use null for what is not said."

# Singular and plural. Some names share a word on purpose: the last word alone does not tell the item.
ITEMS = [
    ("apron", "aprons"),
    ("basket", "baskets"),
    ("beach towel", "beach towels"),
    ("blanket", "blankets"),
    ("bread board", "bread boards"),
    ("candle", "candles"),
    ("carrot cake", "carrot cakes"),
    ("cheese board", "cheese boards"),
    ("coffee mug", "coffee mugs"),
    ("cushion", "cushions"),
    ("desk lamp", "desk lamps"),
    ("flower pot", "flower pots"),
    ("gift box", "gift boxes"),
    ("glass vase", "glass vases"),
    ("honey jar", "honey jars"),
    ("kite", "kites"),
    ("lemon cake", "lemon cakes"),
    ("lunch box", "lunch boxes"),
    ("mirror", "mirrors"),
    ("notebook", "notebooks"),
    ("picnic basket", "picnic baskets"),
    ("pillow", "pillows"),
    ("plum tart", "plum tarts"),
    ("puzzle", "puzzles"),
    ("raincoat", "raincoats"),
    ("rug", "rugs"),
    ("rye loaf", "rye loaves"),
    ("salad bowl", "salad bowls"),
    ("scarf", "scarves"),
    ("soup bowl", "soup bowls"),
    ("straw hat", "straw hats"),
    ("tea towel", "tea towels"),
    ("teapot", "teapots"),
    ("tray", "trays"),
    ("umbrella", "umbrellas"),
    ("wall lamp", "wall lamps"),
]
WORDS = [
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
]  # fmt: skip
QUANTITIES = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 15, 20]
PHRASES = {2: ["a couple of", "a pair of"], 6: ["half a dozen"], 12: ["a dozen"]}
UNCOUNTED = ["some", "some more", "a few"]
SIZES = {"small": ["small", "small", "little"], "medium": ["medium"], "large": ["large", "large", "big"]}
DAYS = ["today", "tomorrow", "monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday"]

# {np} is the thing wanted, {on} a time such as "by Friday", {day} the bare day.
DATED = [
    "please send {np} {on}.",
    "can you bring {np} {on}?",
    "could I get {np} {on}?",
    "I need {np} {on}.",
    "we would like {np}, delivered {on}.",
    "{np} {on}, please.",
    "{np} please, {day} is fine.",
    "I'd like to order {np}. {day} would be best.",
    "{day} delivery please: {np}.",
    "{on} I need {np}.",
    "is {day} possible for {np}?",
    "put me down for {np}, to arrive {on}.",
    "deliver {on}: {np}.",
    "{np}. When? {day}.",
]
UNDATED = [
    "please send {np}.",
    "can you bring {np}?",
    "could I get {np}?",
    "I need {np}, no hurry.",
    "we would like {np} whenever it suits you.",
    "{np}, please.",
    "I'd like to order {np}.",
    "put me down for {np}.",
    "my order: {np}.",
    "{np} for me, any time.",
]
GREETINGS = ["Hi,", "Hello,", "Hi there,", "Good morning,", "Hey,", "Dear shop,", "Hello again,", "Me again:"]
REASONS = [
    "It's for my sister.",
    "We have guests.",
    "The last order was lovely.",
    "Mine broke.",
    "My neighbour loves your shop.",
    "It's a present.",
    "They are for the office.",
    "You were so kind last time.",
    "The kids are excited.",
    "We just moved in.",
]
ENDINGS = ["Thanks!", "Thank you.", "Cheers, Anna", "Many thanks, Tom", "Best, Priya", "Bye!", "Thanks, Omar", "Mei"]
FIXES = ["no, make that {}", "sorry, I mean {}", "wait, {}", "actually {}"]

Record = dict[str, str | int | None]


def draw_record(rng: random.Random) -> Record:
    """One order. A size and a day are missing about a quarter of the time each, the quantity more rarely."""
    item, _ = rng.choice(ITEMS)
    return {
        "item": item,
        "quantity": rng.choice(QUANTITIES) if rng.random() < 0.93 else None,
        "size": rng.choice(list(SIZES)) if rng.random() < 0.72 else None,
        "deliver": rng.choice(DAYS) if rng.random() < 0.75 else None,
    }


def say_number(rng: random.Random, number: int) -> str:
    if number in PHRASES and rng.random() < 0.35:
        return rng.choice(PHRASES[number])
    return WORDS[number] if number < len(WORDS) and rng.random() < 0.5 else str(number)


def say_day(day: str) -> str:
    return day if day in ("today", "tomorrow") else day.capitalize()


def say_when(rng: random.Random, day: str) -> str:
    lead = ["", "for ", "by "] if day in ("today", "tomorrow") else ["on ", "by ", "this ", "for "]
    return rng.choice(lead) + say_day(day)


def other(rng: random.Random, values: list[Any], than: Any) -> Any:
    return rng.choice([value for value in values if value != than])


def say_thing(rng: random.Random, record: Record) -> str:
    """The thing wanted, with its quantity and size in one of several orders, sometimes corrected on the way."""
    singular, plural = next(pair for pair in ITEMS if pair[0] == record["item"])
    number, size = record["quantity"], record["size"]
    noun = singular if number == 1 else plural
    adjective = f"{rng.choice(SIZES[str(size)])} " if size else ""
    if number is None:
        return f"{rng.choice(UNCOUNTED)} {adjective}{noun}"
    assert isinstance(number, int)
    if number == 1 and rng.random() < 0.6:
        article = "an" if (adjective or noun)[0] in "aeiou" else "a"
        return f"{article} {adjective}{noun}"
    said, shape = say_number(rng, number), rng.random()
    if shape < 0.09 and number > 1:
        wrong = other(rng, QUANTITIES[1:], number)
        return f"{say_number(rng, wrong)} {adjective}{noun}, {rng.choice(FIXES).format(say_number(rng, number))}"
    if shape < 0.13 and size:
        wrong_size = other(rng, list(SIZES), size)
        return f"{said} {wrong_size} {noun}, {rng.choice(FIXES).format(size)}"
    if shape < 0.27 and size:
        return f"{said} {noun}{rng.choice([', {},', ' in {}', ' ({})']).format(size)}".rstrip(",")
    if shape < 0.36:
        return f"{adjective}{noun} x{number}"
    return f"{said} {adjective}{noun}"


def say_order(rng: random.Random, record: Record) -> str:
    thing, day = say_thing(rng, record), record["deliver"]
    if day is None:
        return rng.choice(UNDATED).format(np=thing)
    said_day, said_when = say_day(str(day)), say_when(rng, str(day))
    if rng.random() < 0.05:
        wrong = say_day(other(rng, DAYS, str(day)))
        said_day = said_when = f"{wrong}, {rng.choice(FIXES).format(said_day)}"
    return rng.choice(DATED).format(np=thing, on=said_when, day=said_day)


def misspell(rng: random.Random, text: str) -> str:
    """Swap two neighbouring letters inside one word of five letters or more."""
    words = text.split(" ")
    long = [place for place, word in enumerate(words) if word.isalpha() and len(word) >= 5]
    if not long:
        return text
    place = rng.choice(long)
    word = words[place]
    cut = rng.randrange(1, len(word) - 2)
    words[place] = word[:cut] + word[cut + 1] + word[cut] + word[cut + 2 :]
    return " ".join(words)


def write_message(rng: random.Random, record: Record) -> str:
    """What a customer might write to order `record`: a greeting, the order, a reason, thanks; not always all."""
    order = say_order(rng, record)
    greeting = f"{rng.choice(GREETINGS)} " if rng.random() < 0.5 else ""
    if not greeting or greeting.rstrip().endswith("."):
        order = order[0].upper() + order[1:]
    reason = f" {rng.choice(REASONS)}" if rng.random() < 0.3 else ""
    ending = f" {rng.choice(ENDINGS)}" if rng.random() < 0.35 else ""
    text = greeting + order + reason + ending
    if rng.random() < 0.08:
        text = misspell(rng, text)
    return text.lower() if rng.random() < 0.12 else text


def make_rows(rng: random.Random, count: int, seen: set[str]) -> list[dict[str, object]]:
    """`count` rows whose records and messages are not in `seen`; adds them to it."""
    rows: list[dict[str, object]] = []
    while len(rows) < count:
        record = draw_record(rng)
        answer = json.dumps(record, separators=(",", ":"))
        message = write_message(rng, record)
        if answer in seen or message in seen:
            continue
        seen.update((answer, message))
        turns = [("system", SYSTEM), ("user", message), ("assistant", answer)]
        rows.append({"messages": [{"role": role, "content": content} for role, content in turns]})
    return rows


def make_data(train: int, held_out: int, seed: int) -> tuple[list[dict[str, object]], list[dict[str, object]]]:
    """Training rows and held-out rows."""
    seen: set[str] = set()
    exam = make_rows(random.Random(f"{seed} held-out"), held_out, seen)
    return make_rows(random.Random(f"{seed} train"), train, seen), exam


def write_rows(path: Path, rows: list[dict[str, object]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8", newline="\n")


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the order data set of Luthier's demo.")
    parser.add_argument("--out", type=Path, required=True, help="folder to write train.jsonl and held-out.jsonl into")
    parser.add_argument("--train", type=int, default=720, help="training rows (default: 720)")
    parser.add_argument("--held-out", type=int, default=60, help="held-out rows (default: 60)")
    parser.add_argument("--seed", type=int, default=7, help="another seed, other rows (default: 7)")
    asked = parser.parse_args()
    # Past a quarter of all orders there are, drawing unseen ones would get slow and then never end.
    most = len(ITEMS) * (len(QUANTITIES) + 1) * (len(SIZES) + 1) * (len(DAYS) + 1) // 4
    if asked.train < 0 or asked.held_out < 0 or asked.train + asked.held_out > most:
        parser.error(f"found {asked.train} + {asked.held_out} rows, wanted at most {most} in all and none negative")
    train, held_out = make_data(asked.train, asked.held_out, asked.seed)
    write_rows(asked.out / "train.jsonl", train)
    write_rows(asked.out / "held-out.jsonl", held_out)
    print(f"{len(train)} rows in {asked.out / 'train.jsonl'}, {len(held_out)} in {asked.out / 'held-out.jsonl'}")


if __name__ == "__main__":
    main()
