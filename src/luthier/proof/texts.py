"""Text similarity, for answers of which many would do: chrF for each row, BLEU, ROUGE and edit distance beside it.

chrF (Popović, 2015) needs no words, so it means the same in languages that write none. None of these knows whether an
answer is true; they tell how much it reads like the reference.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from typing import Any

from luthier.proof.metrics import Scored, is_exact, mean
from luthier.spec.data import Example

PASS_MARK = 0.5  # of chrF: about half of the character n-grams are shared
_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|[^\W_]+")  # a character of CJK, or a word


class Words:
    """rouge-score's tokenizer for any language: its own keeps a-z and 0-9 only, which leaves Chinese empty."""

    def tokenize(self, text: str) -> list[str]:
        return _WORD.findall(text.casefold())


def is_cjk(texts: Sequence[str]) -> bool:
    """Whether most of the letters are of a script that parts no words."""
    whole = "".join(texts)
    letters = sum(character.isalpha() for character in whole)
    return sum("\u3040" <= character <= "\u9fff" for character in whole) * 2 > letters


def text(answers: Sequence[str], wanted: Sequence[str], examples: Sequence[Example]) -> Scored:
    """chrF of each row, 0 to 1. Details: corpus BLEU and chrF by sacrebleu, mean ROUGE-1 and ROUGE-L F1 by
    rouge-score, mean ratio of rapidfuzz (1 less the edit distance without substitutions, as a share)."""
    del examples
    from rapidfuzz import fuzz
    from rouge_score import rouge_scorer  # type: ignore[import-untyped]
    from sacrebleu import corpus_chrf
    from sacrebleu.metrics.bleu import BLEU

    pairs = list(zip(answers, wanted, strict=True))
    rows = [chrf(answer, reference) for answer, reference in pairs]
    bleu = BLEU(tokenize="zh" if is_cjk(wanted) else "13a")
    rouge: Any = rouge_scorer.RougeScorer(["rouge1", "rougeL"], tokenizer=Words())
    rouges = [rouge.score(reference, answer) for answer, reference in pairs]
    details = {
        "bleu": float(bleu.corpus_score(list(answers), [list(wanted)]).score) / 100,
        "chrf_over_all": float(corpus_chrf(list(answers), [list(wanted)]).score) / 100,
        "rouge_1": mean([float(each["rouge1"].fmeasure) for each in rouges]),
        "rouge_l": mean([float(each["rougeL"].fmeasure) for each in rouges]),
        "fuzzy": mean([fuzz.ratio(answer.strip(), reference.strip()) / 100 for answer, reference in pairs]),
        "exact_match": mean([float(is_exact(*pair)) for pair in pairs]),
    }
    return Scored(rows, details)


def chrf(answer: str, reference: str) -> float:
    """chrF2 of one answer, 0 to 1; 1 for the same text, also where it is too short to have n-grams."""
    if is_exact(answer, reference):
        return 1.0
    return float(_chrf().sentence_score(answer, [reference]).score) / 100


@cache
def _chrf() -> Any:
    from sacrebleu.metrics.chrf import CHRF

    return CHRF()
