"""Secrets and personal data in a text: keys and passwords by their fixed shapes, card numbers by issuer and check
digit, bank accounts by country and check digits, e-mail addresses. What is found is told by place and kind and never
quoted.

The shapes are those that the issuers publish for scanners; a text without the literal that a shape begins with costs
one search. Every repetition is bounded, so that no text takes more than linear time.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Sensitive:
    """code: of the finding. start, end: its half-open span of characters. what: in words, without the thing itself."""

    code: str
    start: int
    end: int
    what: str


# How examples write a password's place: nobody's password.
_PLACEHOLDER = r"[{<\[(]|[$%*]|(?i:pass|passwd|password|pwd|secret|your[_-]?password|x{3,})@"
# Letters and boundaries are ASCII's: in Chinese or Japanese no space stands around a key.
_SHAPES: tuple[tuple[str, str, re.Pattern[str]], ...] = tuple(
    (literal, what, re.compile(shape, re.ASCII))
    for literal, what, shape in (
        (
            "-----BEGIN ",
            "a private key",
            r"-----BEGIN (?:[A-Z0-9]{1,20} ){0,2}PRIVATE KEY(?: BLOCK)?-----(?s:.*)",
        ),
        ("AKIA", "an AWS access key", r"\bAKIA[0-9A-Z]{16}\b"),
        ("ASIA", "an AWS access key", r"\bASIA[0-9A-Z]{16}\b"),
        ("sk-", "an API key", r"\bsk-(?=[A-Za-z_-]{0,200}[0-9])[A-Za-z0-9_-]{20,200}"),
        ("gh", "a GitHub token", r"\bgh[pousr]_[A-Za-z0-9]{36,255}\b"),
        ("github_pat_", "a GitHub token", r"\bgithub_pat_[A-Za-z0-9_]{50,255}\b"),
        ("glpat-", "a GitLab token", r"\bglpat-[A-Za-z0-9_-]{20,255}"),
        ("xox", "a Slack token", r"\bxox[abeoprs]-[A-Za-z0-9-]{10,255}"),
        ("AIza", "a Google API key", r"\bAIza[0-9A-Za-z_-]{35}(?![0-9A-Za-z_-])"),
        ("k_live_", "a Stripe key", r"\b[rs]k_live_[0-9A-Za-z]{20,255}\b"),
        ("hf_", "a Hugging Face token", r"\bhf_[A-Za-z0-9]{30,255}\b"),
        ("npm_", "an npm token", r"\bnpm_[A-Za-z0-9]{36}\b"),
        (
            "eyJ",
            "a JSON Web Token",
            r"\beyJ[A-Za-z0-9_-]{10,2000}\.eyJ[A-Za-z0-9_-]{10,4000}\.[A-Za-z0-9_-]{10,1000}",
        ),
        (
            "://",
            "a password in a URL",
            rf"\b[A-Za-z][A-Za-z0-9+.-]{{1,20}}://[^\s/:@]{{0,64}}:(?!{_PLACEHOLDER})[^\s/@]{{3,128}}@",
        ),
    )
)
# Nobody's are git@… (a clone's address) and …@2x.png (a picture).
_EMAIL = re.compile(
    r"(?<![A-Za-z0-9._%+-])(?!git@)[A-Za-z0-9._%+-]{1,64}@(?!\dx\.)((?:[A-Za-z0-9-]{1,63}\.){1,8}[A-Za-z]{2,24})\b",
    re.ASCII,
)
# Reserved for examples by RFC 2606 and RFC 6761: nobody's address.
_INVENTED = re.compile(r"(?:^|\.)(?:example\.(?:com|net|org)|example|test|invalid|localhost)$", re.IGNORECASE)
# As cards print and people type them: in groups (4-4-4-4, 4-6-4, 4-6-5) or none. A row of more groups is a table.
_SPACE = "[ \u00a0\u202f-]"
_CARD = re.compile(
    rf"(?<![\w.-])(?<!\b0,)(?<!\d{{4}}{_SPACE})"
    rf"(?:\d{{14,19}}|\d{{4}}({_SPACE})(?:\d{{4}}\1\d{{4}}\1\d{{4}}(?!\1\d{{4}}\1\d)|\d{{6}}\1\d{{4,5}}))"
    r"(?![\w-])(?!\.\d)",
    re.ASCII,
)
# Every card begins with them: most texts have none, which is told in a fifth of the time.
_FOUR_DIGITS = re.compile(r"\d\d\d\d", re.ASCII)
# Issuers' first digits and lengths (ISO/IEC 7812).
_ISSUERS = re.compile(
    r"4(?:\d{15}|\d{18})|5[1-5]\d{14}|2(?:22[1-9]|2[3-9]\d|[3-6]\d\d|7[01]\d|720)\d{12}|3[47]\d{13}"
    r"|3(?:0[0-5]|[689]\d)\d{11}|6(?:011|4[4-9]\d|5\d\d)\d{12}|35(?:2[89]|[3-8]\d)\d{12}|62\d{14,17}"
)
# How long a country's IBANs are (ISO 13616, SWIFT's registry).
_IBAN_LENGTHS = {
    country: length
    for length, countries in (
        (15, "NO"),
        (16, "BE"),
        (18, "DK FI FO GL NL"),
        (19, "MK SI"),
        (20, "AT BA EE KZ LT LU XK"),
        (21, "CH HR LI LV"),
        (22, "BG BH DE GB GE IE ME RS VA"),
        (23, "AE GI IL IQ"),
        (24, "AD CZ ES MD PK RO SA SE SK TN"),
        (25, "PT"),
        (26, "IS TR"),
        (27, "FR GR IT MC MR SM"),
        (28, "AL AZ CY DO GT HU LB PL"),
        (29, "BR EG PS QA UA"),
        (30, "JO KW MU"),
        (31, "MT"),
    )
    for country in countries.split()
}
_IBAN = re.compile(rf"[A-Z](?<![A-Za-z0-9].)[A-Z]\d\d(?=((?:{_SPACE}?[A-Z0-9]){{11,27}}))", re.ASCII)


def find_sensitive(text: str) -> Iterator[Sensitive]:
    """What a text holds of each kind: its first place."""
    for literal, what, shape in _SHAPES:
        found = shape.search(text) if literal in text else None
        if found is not None:
            yield Sensitive("secret", *found.span(), what)
    cards = _CARD.finditer(text) if _FOUR_DIGITS.search(text) else ()
    card = next((m for m in cards if is_card_number(m[0])), None)
    if card is not None:
        yield Sensitive("card_number", *card.span(), "a payment card's number")
    account = next((m for m in _IBAN.finditer(text) if is_iban(m[0] + m[1])), None)
    if account is not None:
        yield Sensitive("bank_account", account.start(), account.end(1), "a bank account's number")
    if "@" in text:
        email = next((m for m in _EMAIL.finditer(text) if not _INVENTED.search(m[1])), None)
        if email is not None:
            yield Sensitive("email", *email.span(), "an e-mail address")


def redacted(text: str) -> str:
    """The text with what is sensitive in it replaced by what that is."""
    while (found := next(find_sensitive(text), None)) is not None:
        text = f"{text[: found.start]}({found.what}){text[found.end :]}"
    return text


def is_card_number(text: str) -> bool:
    """Whether digits (with what stands between their groups) are of an issuer's range and length and pass Luhn's
    check."""
    digits = re.sub(_SPACE, "", text)
    return _ISSUERS.fullmatch(digits) is not None and luhn(digits)


def luhn(digits: str) -> bool:
    """Luhn's check (ISO/IEC 7812-1): every second digit from the right doubled, the sum a multiple of ten."""
    doubled = (sum(divmod(2 * int(digit), 10)) for digit in digits[-2::-2])
    return (sum(doubled) + sum(map(int, digits[-1::-2]))) % 10 == 0


def is_iban(text: str) -> bool:
    """Whether a text begins with an account's number of its country's length (with or without what stands between its
    groups) that passes ISO 7064's check, MOD 97-10."""
    size = _IBAN_LENGTHS.get(text[:2], 0)
    code = re.sub(_SPACE, "", text)[:size]
    return bool(size) and len(code) == size and _mod_97(code[4:] + code[:4]) == 1


def _mod_97(code: str) -> int:
    """Letters count from A = 10 on."""
    return int("".join(str(int(character, 36)) for character in code)) % 97
