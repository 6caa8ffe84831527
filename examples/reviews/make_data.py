"""Turn two public review collections, which you have on disk, into training and held-out files for `luthier train`.

    python examples/reviews/make_data.py rt-polarity FOLDER --out data/rt       # rt-polarity.pos and .neg, one a line
    python examples/reviews/make_data.py labelled-csv FILE  --out data/waimai   # columns label,review (1 = positive)

Rows are shuffled (the files list one class first), and no review is on both sides. Nothing of the data is in this
repository; docs/experiments.md has what came out.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
from collections.abc import Iterator
from pathlib import Path

Labelled = tuple[str, bool]
WORDS = {
    "en": ("Is this film review positive or negative? Answer with one word.", "positive", "negative"),
    "zh": ("这条评价是好评还是差评？只回答两个字。", "好评", "差评"),
}


def rt_polarity(folder: Path) -> Iterator[Labelled]:
    for name, positive in (("rt-polarity.pos", True), ("rt-polarity.neg", False)):
        raw = (folder / name).read_bytes()
        for line in raw.decode("utf-8" if _is_utf8(raw) else "cp1252").split("\n"):
            if line.strip():
                yield line.strip(), positive


def labelled_csv(file: Path) -> Iterator[Labelled]:
    with open(file, encoding="utf-8-sig", newline="") as handle:
        for row in csv.DictReader(handle):
            yield row["review"].strip(), row["label"].strip() == "1"


def _is_utf8(raw: bytes) -> bool:
    try:
        raw.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def record(review: str, positive: bool, language: str) -> dict[str, object]:
    question, yes, no = WORDS[language]
    return {
        "messages": [
            {"role": "system", "content": question},
            {"role": "user", "content": review},
            {"role": "assistant", "content": yes if positive else no},
        ]
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=["rt-polarity", "labelled-csv"])
    parser.add_argument("source", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--language", choices=sorted(WORDS), help="default: en for rt-polarity, zh for labelled-csv")
    parser.add_argument("--train", type=int, default=3000, help="training rows (default 3000)")
    parser.add_argument("--held-out", type=int, default=400, help="held-out rows (default 400)")
    parser.add_argument("--seed", type=int, default=7)
    asked = parser.parse_args()
    rows = list(dict((rt_polarity if asked.kind == "rt-polarity" else labelled_csv)(asked.source)).items())
    random.Random(asked.seed).shuffle(rows)
    language = asked.language or ("en" if asked.kind == "rt-polarity" else "zh")
    held, train = rows[: asked.held_out], rows[asked.held_out : asked.held_out + asked.train]
    asked.out.mkdir(parents=True, exist_ok=True)
    for name, part in (("train", train), ("held-out", held)):
        lines = [json.dumps(record(review, positive, language), ensure_ascii=False) for review, positive in part]
        (asked.out / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        print(f"{asked.out / name}.jsonl: {len(part)} rows, {sum(positive for _, positive in part)} positive")


if __name__ == "__main__":
    main()
