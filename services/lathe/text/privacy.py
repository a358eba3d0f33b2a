"""Secrets and personal data in a text: keys and passwords by their fixed shapes, card numbers by issuer and check
digit, e-mail addresses. What is found is told by place and kind and never quoted.

The shapes are those that the issuers publish for scanners; a text without the literal that a shape begins with costs
one search. Every repetition is bounded, so that no text takes more than linear time.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Sensitive:
    """code: of the finding. start: the character it begins at. what: in words, without the thing itself."""

    code: str
    start: int
    what: str


_SHAPES: tuple[tuple[str, str, re.Pattern[str]], ...] = tuple(
    (literal, what, re.compile(shape))
    for literal, what, shape in (
        ("-----BEGIN ", "a private key", r"-----BEGIN (?:[A-Z0-9]{1,20} ){0,2}PRIVATE KEY-----"),
        ("AKIA", "an AWS access key", r"\bAKIA[0-9A-Z]{16}\b"),
        ("ASIA", "an AWS access key", r"\bASIA[0-9A-Z]{16}\b"),
        ("sk-", "an API key", r"\bsk-[A-Za-z0-9_-]{20,200}"),
        ("gh", "a GitHub token", r"\bgh[pousr]_[A-Za-z0-9]{36,255}\b"),
        ("github_pat_", "a GitHub token", r"\bgithub_pat_[A-Za-z0-9_]{50,255}\b"),
        ("glpat-", "a GitLab token", r"\bglpat-[A-Za-z0-9_-]{20,255}"),
        ("xox", "a Slack token", r"\bxox[abeoprs]-[A-Za-z0-9-]{10,255}"),
        ("AIza", "a Google API key", r"\bAIza[0-9A-Za-z_-]{35}\b"),
        ("k_live_", "a Stripe key", r"\b[rs]k_live_[0-9A-Za-z]{20,255}\b"),
        ("hf_", "a Hugging Face token", r"\bhf_[A-Za-z0-9]{30,255}\b"),
        ("npm_", "an npm token", r"\bnpm_[A-Za-z0-9]{36}\b"),
        (
            "eyJ",
            "a JSON Web Token",
            r"\beyJ[A-Za-z0-9_-]{10,2000}\.eyJ[A-Za-z0-9_-]{10,4000}\.[A-Za-z0-9_-]{10,1000}",
        ),
        ("://", "a password in a URL", r"\b[a-z][a-z0-9+.-]{1,20}://[^\s/:@]{1,64}:[^\s/@]{3,128}@"),
    )
)
_EMAIL = re.compile(
    r"(?<![A-Za-z0-9._%+-])[A-Za-z0-9._%+-]{1,64}@((?:[A-Za-z0-9-]{1,63}\.){1,8}[A-Za-z]{2,24})\b"
)
# Reserved for examples by RFC 2606 and RFC 6761: nobody's address.
_INVENTED = re.compile(r"(?:^|\.)(?:example\.(?:com|net|org)|example|test|invalid|localhost)$", re.IGNORECASE)
_DIGITS = re.compile(r"(?<![\w.,-])(?:\d[ -]?){12,18}\d(?![\w-])")
# Issuers' first digits and lengths (ISO/IEC 7812).
_ISSUERS = re.compile(
    r"4(?:\d{12}|\d{15}|\d{18})|5[1-5]\d{14}|2(?:22[1-9]|2[3-9]\d|[3-6]\d\d|7[01]\d|720)\d{12}|3[47]\d{13}"
    r"|3(?:0[0-5]|[689]\d)\d{11}|6(?:011|4[4-9]\d|5\d\d)\d{12}|35(?:2[89]|[3-8]\d)\d{12}"
)


def find_sensitive(text: str) -> Iterator[Sensitive]:
    """What a text holds of each kind: its first place."""
    for literal, what, shape in _SHAPES:
        found = shape.search(text) if literal in text else None
        if found is not None:
            yield Sensitive("secret", found.start(), what)
    card = next((m for m in _DIGITS.finditer(text) if is_card_number(m[0])), None)
    if card is not None:
        yield Sensitive("card_number", card.start(), "a payment card's number")
    if "@" in text:
        email = next((m for m in _EMAIL.finditer(text) if not _INVENTED.search(m[1])), None)
        if email is not None:
            yield Sensitive("email", email.start(), "an e-mail address")


def is_card_number(text: str) -> bool:
    """Whether digits (with spaces or hyphens) are of an issuer's range and length and pass Luhn's check."""
    digits = text.replace(" ", "").replace("-", "")
    return _ISSUERS.fullmatch(digits) is not None and luhn(digits)


def luhn(digits: str) -> bool:
    """Luhn's check (ISO/IEC 7812-1): every second digit from the right doubled, the sum a multiple of ten."""
    doubled = (sum(divmod(2 * int(digit), 10)) for digit in digits[-2::-2])
    return (sum(doubled) + sum(map(int, digits[-1::-2]))) % 10 == 0
