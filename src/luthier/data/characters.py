"""What a text is written with: control-token spellings, characters that a wrong encoding left, script and language.

Does not know: records, tokenizers (a model's control tokens come in as a pattern).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import cache

import numpy as np
import numpy.typing as npt

# Control tokens of common chat templates, for when no model says which are its own.
COMMON_CONTROL = re.compile(
    r"<\|[A-Za-z_][A-Za-z0-9_ ]{0,40}\|>|</s>|<s>\s?\[INST\]|\[/?INST\]|<</?SYS>>|<(?:start|end)_of_turn>"
    r"|<(?:bos|eos|pad|unk)>|<｜[^｜\n]{1,40}｜>"
)
# UTF-8 that was read as Latin-1 or Windows-1252: a lead byte as its letter, then as many continuation bytes.
_CONTINUED = "[\u0080-\u00bf\u0152\u0153\u0160\u0161\u0178\u017d\u017e\u0192\u02c6\u02dc\u2013-\u203a\u20ac\u2122]"
_MOJIBAKE = re.compile(
    rf"[\u00c2\u00c3][\u0080-\u00bf]|[\u00c4-\u00df]{_CONTINUED}{{1}}(?=[\u00c3-\u00df]{_CONTINUED})"
    rf"|[\u00e0-\u00ef]{_CONTINUED}{{2}}|\u00f0\u0178{_CONTINUED}{{2}}|\u00f0\u009f{_CONTINUED}{{2}}"
)
_CONTROLS = re.compile("[\x00-\x08\x0b\x0e-\x1f\x7f-\x84\x86-\x9f]")

# First code points of what each script fills, coarsely; what is not listed counts as no letter.
_BLOCKS: tuple[tuple[int, int, str], ...] = (
    (0x41, 0x5B, "Latin"),
    (0x61, 0x7B, "Latin"),
    (0xC0, 0x250, "Latin"),
    (0x1E00, 0x1F00, "Latin"),
    (0x370, 0x400, "Greek"),
    (0x400, 0x530, "Cyrillic"),
    (0x590, 0x600, "Hebrew"),
    (0x600, 0x780, "Arabic"),
    (0x900, 0x980, "Hindi"),
    (0x980, 0xA00, "Bengali"),
    (0xB80, 0xC00, "Tamil"),
    (0xE00, 0xE80, "Thai"),
    (0x3040, 0x3100, "Japanese"),
    (0x3400, 0x4DC0, "Chinese"),
    (0x4E00, 0xA000, "Chinese"),
    (0x20000, 0x30000, "Chinese"),
    (0x1100, 0x1200, "Korean"),
    (0xAC00, 0xD7B0, "Korean"),
)
SCRIPTS = ("", *dict.fromkeys(name for _, _, name in _BLOCKS))
# The commonest words of languages in Latin letters. A word that several of them have speaks for each.
_WORDS = {
    "English": "the of and to in is was that it for with as on be are this by from or have not you his they what "
    "which at an can will how your has do we i if would there about",
    "French": "le la les des est et une du dans que qui pour pas sur au avec ce il elle sont nous vous par plus "
    "ne se mais cette son je être ou un de en",
    "German": "der die das und ist nicht ein eine zu den mit von auf für dem sich des im auch es als wie wir sie "
    "ich bei oder aber wird sind einen er war",
    "Spanish": "el la los las que y en un una por con para es del se no lo como más su al está pero son este "
    "fue muy sus o de yo ha",
    "Italian": "il che di e la un una per non è con si da del della sono come più nel alla le gli anche questo "
    "ma lo dei ha i al",
    "Portuguese": "o que e do da em um uma para com não os no se na por mais as dos como mas ao ele das é você "
    "são à seu sua foi de eu",
    "Dutch": "de het een en van is dat op te in zijn niet voor met die er aan ook als bij maar om dan wordt "
    "naar deze ik je wat we ze",
}
LANGUAGES = ("", *_WORDS, *(name for name in SCRIPTS[1:] if name != "Latin"), "another in Latin letters")
_FEWEST_LETTERS = 12
_FEWEST_WORDS = 3
_LOOKED_AT = 4000  # characters of a text that tell its script
_WORDS_WITHIN = 1500  # of them, those whose words tell its language


@cache
def _script_table() -> npt.NDArray[np.uint8]:
    table = np.zeros(0x30000, np.uint8)
    for first, end, name in _BLOCKS:
        table[first:end] = SCRIPTS.index(name)
    table[[0xD7, 0xF7]] = 0  # the signs of multiplication and division between the letters
    return table


@cache
def _word_table() -> dict[str, tuple[int, ...]]:
    names = list(_WORDS)
    table: dict[str, tuple[int, ...]] = {}
    for number, name in enumerate(names):
        for word in _WORDS[name].split():
            table[word] = (*table.get(word, ()), number)
    return table


def control_pattern(tokens: Iterable[str]) -> re.Pattern[str] | None:
    """What finds any of a model's control tokens; None when it has none."""
    spellings = sorted(tokens, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, spellings))) if spellings else None


def broken(text: str) -> str | None:
    """What a wrong encoding left in `text`, in words; None when nothing did."""
    if text.isascii():
        found = _CONTROLS.search(text)
        return None if found is None else f"the control character U+{ord(found[0]):04X}"
    if "\ufffd" in text:
        return "U+FFFD, which stands for bytes that could not be read"
    if "\ufeff" in text:
        return "a byte-order mark inside the text"
    found = _CONTROLS.search(text)
    mojibake = _MOJIBAKE.search(text)
    if mojibake:
        return f"{mojibake[0]!r}, UTF-8 that was read as another encoding"
    return None if found is None else f"the control character U+{ord(found[0]):04X}"


def language(text: str) -> int:
    """Index into LANGUAGES; 0 where there is too little to tell."""
    text = text[:_LOOKED_AT]
    if text.isascii():
        return _latin(text)
    points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
    counts = np.bincount(_script_table()[np.minimum(points, 0x2FFFF)], minlength=len(SCRIPTS))
    counts[0] = 0
    japanese, chinese = SCRIPTS.index("Japanese"), SCRIPTS.index("Chinese")
    if 10 * counts[japanese] > counts[chinese]:
        counts[japanese] += counts[chinese]
        counts[chinese] = 0
    # A word of Chinese, Japanese or Korean takes two characters, a Latin one five.
    weighed = counts.copy()
    for dense in ("Japanese", "Chinese", "Korean"):
        weighed[SCRIPTS.index(dense)] *= 3
    most = int(weighed.argmax())
    if weighed[most] < _FEWEST_LETTERS:
        return 0
    return _latin(text) if SCRIPTS[most] == "Latin" else LANGUAGES.index(SCRIPTS[most])


def _latin(text: str) -> int:
    table = _word_table()
    votes = [0] * len(_WORDS)
    words = text[:_WORDS_WITHIN].split()
    for word in words:
        if len(word) > 1 or word.islower():  # Y is no Spanish word in Y = 7
            for number in table.get(word.lower().strip(".,;:!?\"'()"), ()):
                votes[number] += 1
    most = max(votes)
    if most >= _FEWEST_WORDS and most * 12 >= len(words) and votes.count(most) == 1:
        return 1 + votes.index(most)
    if len(words) >= 30 and not sum(votes):  # letters with marks, or it may be a list of nouns in any language
        marked = sum(letter > "\x7f" and letter.isalpha() for letter in text)
        return len(LANGUAGES) - 1 if 50 * marked > len(text) else 0
    return 0
