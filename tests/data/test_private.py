"""Secrets and personal data: what is found, what is left alone, and that nothing found is shown whole."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from luthier.data.private import find_private, luhn, masked

FOUND = [
    ("mail me at ann.lee+x@mail.firm.co.uk.", "personal_data", "e-mail address", "ann.lee+x@mail.firm.co.uk"),
    ("card 4111 1111 1111 1111!", "personal_data", "card number", "4111 1111 1111 1111"),
    ("card 5500-0055-5555-5559", "personal_data", "card number", "5500-0055-5555-5559"),
    ("call +44 20 7946 0958 now", "personal_data", "telephone number", "+44 20 7946 0958"),
    ("call (212) 555-0142", "personal_data", "telephone number", "(212) 555-0142"),
    ("电话13812345678。", "personal_data", "telephone number", "13812345678"),
    ("ssn 123-45-6789", "personal_data", "social security number", "123-45-6789"),
    ("GB82 WEST 1234 5698 7654 32", "personal_data", "bank account (IBAN)", "GB82 WEST 1234 5698 7654 32"),
    ("key sk-" + "a1B2" * 6, "secret", "API key", "sk-" + "a1B2" * 6),
    ("AKIAIOSFODNN7EXAMPLE", "secret", "AWS access key", "AKIAIOSFODNN7EXAMPLE"),
    ("ghp_" + "Zz09" * 9, "secret", "GitHub token", "ghp_" + "Zz09" * 9),
    ("postgres://joe:h7nnter2@db/x", "secret", "password in a URL", "h7nnter2"),
    ('{"password": "tR0ub4dor&3x"}', "secret", "password or key", "tR0ub4dor&3x"),
    ("-----BEGIN RSA PRIVATE KEY-----\nMIIB\n-----END RSA PRIVATE KEY-----", "secret", "private key", None),
]


@pytest.mark.parametrize(("text", "kind", "what", "spelt"), FOUND, ids=[what for _, _, what, _ in FOUND])
def test_found(text: str, kind: str, what: str, spelt: str | None) -> None:
    (found,) = find_private(text)
    assert (found.kind, found.what) == (kind, what)
    if spelt is not None:
        assert text[found.start : found.end] == spelt
        assert spelt not in masked(text, found)
        assert masked(text, found).startswith(what)


@pytest.mark.parametrize(
    "text",
    [
        "4111 1111 1111 1112",  # its check digit is wrong
        "0000000000000000",
        "in 2024-01-31 12:30:45 we sold 1234567890 units for 12,345,678.90",
        "pi is 3.14159265358979",
        "version 10.0.19041.1234",
        "password: mandatory",
        "the secret: something",
        "user@localhost",
        "write to jane@example.com",
        "ask the tokenizer for token = next_token()",
        "sk-learn",
        "GB82 WEST 1234 5698 7654 33",
        "https://host/path:80@2x.png",
    ],
)
def test_left_alone(text: str) -> None:
    assert list(find_private(text)) == []


def test_every_place_is_found_and_none_twice() -> None:
    text = "a@b.io, c@d.io and 4111111111111111"
    assert [text[found.start : found.end] for found in find_private(text)] == ["a@b.io", "c@d.io", "4111111111111111"]


@given(st.text(alphabet="0123456789", min_size=12, max_size=18))
def test_exactly_one_check_digit_fits(digits: str) -> None:
    assert sum(luhn(digits + check) for check in "0123456789") == 1


@given(st.text(max_size=200))
def test_places_lie_in_the_text_in_order(text: str) -> None:
    for kind in ("secret", "personal_data"):
        places = [(found.start, found.end) for found in find_private(text) if found.kind == kind]
        assert all(0 <= start < end <= len(text) for start, end in places)
        assert all(before[1] <= after[0] for before, after in pairwise(places))
