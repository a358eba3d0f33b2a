"""Secrets and personal data, found without being quoted."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lathe.text.privacy import find_sensitive, is_card_number, luhn


def codes(text: str) -> list[str]:
    return [item.code for item in find_sensitive(text)]


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("use AKIA" + "ABCD" * 4, "secret"),
        ("sk-" + "aB3-" * 8, "secret"),
        ("ghp_" + "a1B2" * 9, "secret"),
        ("hf_" + "abcDEF" * 6, "secret"),
        ("-----BEGIN RSA PRIVATE KEY-----\nMII", "secret"),
        ("postgres://joe:hunter22@db:5432/x", "secret"),
        ("eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.dGhpc2lzYXNpZw", "secret"),
        ("card 4111 1111 1111 1111, thanks", "card_number"),
        ("5555-5555-5555-4444", "card_number"),
        ("378282246310005.", "card_number"),
        ("write to ann.b+c@mail.firma.de!", "email"),
    ],
)
def test_what_is_sensitive_is_found_and_not_quoted(text, code):
    (item,) = find_sensitive(text)
    assert item.code == code
    assert text[item.start :].strip() not in item.what and len(item.what) < 40


@pytest.mark.parametrize(
    "text",
    [
        "4111 1111 1111 1112",
        "order 1234567890123456",
        "9.4111111111111111",
        "a@b",
        "someone@example.com",
        "x@y.test",
        "the task-force asks://it",
        "https://example.com/a:b@c",
        "AKIA is a prefix",
        "2024-01-01 12:00",
    ],
)
def test_what_only_looks_like_it_is_left_alone(text):
    assert codes(text) == []


@given(st.text(alphabet="0123456789", min_size=2, max_size=24))
def test_one_wrong_digit_fails_the_check(digits):
    check = next(str(n) for n in range(10) if luhn(digits + str(n)))
    assert sum(luhn(digits + str(n)) for n in range(10)) == 1
    assert luhn(digits + check)


def test_a_card_of_no_issuer_is_none():
    assert is_card_number("4012 8888 8888 1881") and not is_card_number("0000000000000000")


@pytest.mark.parametrize("text", ["a" * 400_000 + "@", "1 " * 200_000, "eyJ" * 100_000, "a.b@" * 100_000])
def test_no_text_takes_long(text):
    begin = time.thread_time()  # not how busy the machine is
    codes(text)
    assert time.thread_time() - begin < 2
