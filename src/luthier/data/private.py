"""Secrets and personal data in a text: keys by the form that their issuers give them, numbers by their check digits.

Likely, not certain: forms are matched, nobody is asked whether a key works. What is found is never shown whole.
Does not know: records, files, how anything is redacted (fix.py).
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

Kind = Literal["secret", "personal_data"]


@dataclass(frozen=True, slots=True)
class Private:
    """`text[start:end]` is likely private. `what` says what it looks like: "e-mail address", "API key"."""

    kind: Kind
    what: str
    start: int
    end: int


# Secrets: (what, a text that must be there for the pattern to be tried, pattern). The first group, if any, is the
# secret; else the whole match.
_SECRETS: tuple[tuple[str, str, re.Pattern[str]], ...] = tuple(
    (what, sign, re.compile(pattern))
    for what, sign, pattern in (
        ("API key", "sk-", r"\bsk-[A-Za-z0-9_-]{20,}"),
        ("AWS access key", "AKIA", r"\bAKIA[0-9A-Z]{16}\b"),
        ("AWS access key", "ASIA", r"\bASIA[0-9A-Z]{16}\b"),
        ("GitHub token", "gh", r"\bgh[opsur]_[A-Za-z0-9]{36,}\b"),
        ("GitHub token", "github_pat_", r"\bgithub_pat_[A-Za-z0-9_]{22,}\b"),
        ("GitLab token", "glpat-", r"\bglpat-[A-Za-z0-9_-]{20,}"),
        ("Slack token", "xox", r"\bxox[abeoprs]-[A-Za-z0-9-]{10,}"),
        ("Google API key", "AIza", r"\bAIza[0-9A-Za-z_-]{35}"),
        ("Stripe key", "k_live_", r"\b[prs]k_live_[0-9A-Za-z]{16,}"),
        ("Hugging Face token", "hf_", r"\bhf_[A-Za-z]{30,}\b"),
        ("npm token", "npm_", r"\bnpm_[A-Za-z0-9]{36}\b"),
        ("JSON web token", "eyJ", r"\beyJ[A-Za-z0-9_-]{8,}\.eyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{8,}"),
        ("private key", "PRIVATE KEY", r"-----BEGIN (?:[A-Z]+ )?PRIVATE KEY(?: BLOCK)?-----(?:[^-]{0,8000}-----END)?"),
        ("password in a URL", "://", r"\b[a-z][a-z0-9+.-]{1,20}://[^\s/:@]{1,64}:([^\s/@]{3,64})@"),
    )
)
_NAMED_SECRET = re.compile(
    r"(?i)\b(?:password|passwd|pwd|secret|api[_-]?key|access[_-]?token|auth[_-]?token|secret[_-]?key)\b"
    r"[\"']?\s{0,3}[:=]\s{0,3}[\"']?([^\s\"',;<>{}()]{8,128})"
)
_NAMES = ("passw", "pwd", "secret", "api_key", "apikey", "api-key", "token")
_LEAST_BITS = 2.8  # of entropy a character in a named secret: `password: mandatory` has 2.7, a drawn one over 3

_EMAIL = re.compile(r"\b[A-Za-z0-9][A-Za-z0-9._%+-]{0,63}@(?:[A-Za-z0-9-]{1,63}\.){1,8}[A-Za-z]{2,24}\b")
_DIGITS = re.compile(r"(?<![A-Za-z0-9_.])\+?\(?\d(?:[ ().-]{0,2}\d){7,30}(?![A-Za-z0-9_])")
_DIGIT = re.compile("[0-9]")
_IBAN = re.compile(r"\b[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?\b")
_NO_ADDRESS = (
    ".png",
    ".jpg",
    ".jpeg",
    ".gif",
    ".svg",
    ".webp",
    "example.com",
    "example.org",
    "example.net",
    "domain.com",
    "email.com",
    "company.com",
)
# Cards as their issuers print them, in groups, or as one number of their issuers' lengths. Results of sums are neither.
_CARD = re.compile(
    r"(?:4\d|5[1-5]|2[2-7]|6[0245]|35)\d\d([ -]?)\d{4}\1\d{4}\1\d{4}|3[47]\d\d([ -]?)\d{6}\2\d{5}"
    r"|3[068]\d\d([ -])\d{6}\3\d{4}"
)
_PLACEHOLDER = re.compile(r"(?:\+?1)?(?:555\d{7}|1234567890|0123456789)")
_LONGEST_UNBROKEN = 13  # digits of a telephone number without any separator
_CHINESE_MOBILE = re.compile(r"(?:86)?1[3-9]\d{9}")
_PHONE = re.compile(
    r"\+\d{1,3}[ .-]?(?:\(?\d{1,5}\)?[ .-]?){1,6}\d{1,5}"  # international
    r"|\(\d{3}\) ?\d{3}[ .-]\d{4}|\d{3}[.-]\d{3}[.-]\d{4}"  # North America
    r"|0\d{1,4}[ -/]\d{3,4}[ -]?\d{3,5}"  # national, with its area code
)


def find_private(text: str) -> Iterator[Private]:
    """Likely secrets and personal data of `text`, without overlaps within each of the two kinds."""
    yield from _apart(_secrets(text))
    yield from _apart(_personal(text))


def masked(text: str, found: Private) -> str:
    """What was found, for a report: what it looks like, and no more of it than its beginning."""
    spelt = text[found.start : found.end]
    return f"{found.what} {spelt[: min(4, len(spelt) // 3)]}..."


def _apart(found: Iterator[Private]) -> Iterator[Private]:
    end = -1
    for each in sorted(found, key=lambda one: (one.start, -one.end)):
        if each.start >= end:
            yield each
            end = each.end


def _secrets(text: str) -> Iterator[Private]:
    for what, sign, pattern in _SECRETS:
        if sign in text:
            for match in pattern.finditer(text):
                yield Private("secret", what, *match.span(match.lastindex or 0))
    lowered = text.lower()
    if any(name in lowered for name in _NAMES):
        for match in _NAMED_SECRET.finditer(text):
            value = match[1]
            varied = any(map(str.isdigit, value)) and not value.isdigit()
            if varied and _bits(value) >= _LEAST_BITS:
                yield Private("secret", "password or key", *match.span(1))


def _personal(text: str) -> Iterator[Private]:
    if "@" in text:
        for match in _EMAIL.finditer(text):
            if not match[0].lower().endswith(_NO_ADDRESS):
                yield Private("personal_data", "e-mail address", *match.span())
    if _DIGIT.search(text) is None:
        return
    for match in _DIGITS.finditer(text):
        what = _number(match[0])
        if what:
            yield Private("personal_data", what, *match.span())
    for match in _IBAN.finditer(text):
        if _iban_holds(match[0].replace(" ", "")):
            yield Private("personal_data", "bank account (IBAN)", *match.span())


def _number(spelt: str) -> str | None:
    """What a run of digits with separators is, if it is anybody's."""
    digits = re.sub(r"\D", "", spelt)
    if re.fullmatch(r"\d{3}-\d{2}-\d{4}", spelt) and digits[:3] not in ("000", "666") and digits[0] != "9":
        return "social security number"
    if _CARD.fullmatch(spelt) and luhn(digits) and len(set(digits)) > 1:
        return "card number"
    if len(digits) == 18 and _chinese_id_holds(digits):
        return "identity number"
    if _PLACEHOLDER.fullmatch(digits) or (spelt.lstrip("+") == digits and len(digits) > _LONGEST_UNBROKEN):
        return None
    if 8 <= len(digits) <= 15 and (_PHONE.fullmatch(spelt) or (_CHINESE_MOBILE.fullmatch(digits) and digits == spelt)):
        return "telephone number"
    return None


def luhn(digits: str) -> bool:
    """Whether the check digit of a card number holds."""
    total = 0
    for place, digit in enumerate(reversed(digits)):
        value = int(digit) * (2 if place % 2 else 1)
        total += value - 9 if value > 9 else value
    return total % 10 == 0


def _iban_holds(spelt: str) -> bool:
    """ISO 13616: the number made of its characters is 1 modulo 97."""
    if not 15 <= len(spelt) <= 34:
        return False
    return int("".join(str(int(character, 36)) for character in spelt[4:] + spelt[:4])) % 97 == 1


def _chinese_id_holds(digits: str) -> bool:
    """GB 11643: a birth date in the middle, and a weighted sum that is 1 modulo 11."""
    year, month, day = int(digits[6:10]), int(digits[10:12]), int(digits[12:14])
    if not (1900 <= year <= 2100 and 1 <= month <= 12 and 1 <= day <= 31):
        return False
    return sum(int(digit) * pow(2, 17 - place, 11) for place, digit in enumerate(digits)) % 11 == 1


def _bits(text: str) -> float:
    """Shannon entropy in bits a character."""
    return -sum(n / len(text) * math.log2(n / len(text)) for n in Counter(text).values())
