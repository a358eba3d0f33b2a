"""Secrets and personal data, found without being quoted."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lathe.text.privacy import find_sensitive, is_card_number, luhn, redacted


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
        ("6212345678901232", "card_number"),
        ("write to ann.b+c@mail.firma.de!", "email"),
        ("IBAN: DE89 3704 0044 0532 0130 00 BIC COBADEFF", "bank_account"),
        ("GB82WEST12345698765432.", "bank_account"),
        ("-----BEGIN PGP PRIVATE KEY BLOCK-----", "secret"),
        ("redis://:hunter22@db:6379", "secret"),
    ],
)
def test_what_is_sensitive_is_found_and_not_quoted(text, code):
    (item,) = find_sensitive(text)
    assert item.code == code
    assert text[item.start :].strip() not in item.what and len(item.what) < 40


@pytest.mark.parametrize(
    "text",
    [
        "4111 1111 1111 1111 12/27",
        "4111 1111 1111 1111 123",
        "1 4111 1111 1111 1111",
        "Ann,4111111111111111,12/27",
        "3782 822463 10005 12/27",
        "4111\u00a01111\u00a01111\u00a01111",
    ],
)
def test_a_card_is_found_beside_other_numbers(text):
    assert codes(text) == ["card_number"]


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("我的密钥是sk-" + "aB3dE6" * 8 + "，请保密", "secret"),
        ("鍵はAKIA" + "Q7A8" * 4 + "です", "secret"),
        ("卡号4111111111111111。", "card_number"),
        ("口座DE89370400440532013000です", "bank_account"),
        ("メールはann@firma.deに", "email"),
    ],
)
def test_no_space_is_needed_where_none_is_written(text, code):
    assert codes(text) == [code]


@pytest.mark.parametrize(
    "text",
    [
        "DE88 3704 0044 0532 0130 00",
        "DE89 3704 0044 0532 0130",
        "XDE89370400440532013000",
        "git clone git@github.com:lathe/lathe.git",
        "icon@2x.png",
        "sk-toggleable__content-arrow",
        "postgresql://{user}:{password}@{host}/db",
        "postgresql://user:password@localhost/db",
        "EAN 4006381333931",
        "x = 5500000000000004.0",
        "4111 1111 1111 1111 2222 3333",
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


@pytest.mark.parametrize(
    "text", ["a" * 400_000 + "@", "1 " * 200_000, "eyJ" * 100_000, "a.b@" * 100_000, "NO93 " * 80_000]
)
def test_no_text_takes_long(text):
    begin = time.thread_time()  # not how busy the machine is
    codes(text)
    assert time.thread_time() - begin < 2


def test_what_is_sensitive_is_taken_out_of_a_text():
    key = "AKIA" + "Q7A8" * 4
    told = redacted(f"unknown role '{key}'; not {key}, ann@firma.de or 4111 1111 1111 1111 12/27")
    assert told == (
        "unknown role '(an AWS access key)'; not (an AWS access key), (an e-mail address) or "
        "(a payment card's number) 12/27"
    )
    assert redacted("-----BEGIN RSA PRIVATE KEY-----\nMIIE") == "(a private key)"
    assert redacted("DE89 3704 0044 0532 0130 00 of Ann").startswith("(a bank account's number)")
    assert redacted("messages[0].role") == "messages[0].role"


@given(st.text())
def test_nothing_sensitive_is_left(text):
    assert codes(redacted(text)) == []
