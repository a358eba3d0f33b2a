"""What a connection that was not made means."""

import pytest

from lathe.common.rpc.status import explain_connection

TRIED = "failed to connect to all addresses; last error: UNKNOWN: ipv4:127.0.0.1:1: "


@pytest.mark.parametrize(
    ("message", "words"),
    [
        (f"{TRIED}Failed to connect to remote host: Connection refused", "Nothing answers at the address"),
        ("errors resolving nonsense: [field:hostname lookup error]", "no such host"),
        (f"{TRIED}Ssl handshake failed: CERTIFICATE_VERIFY_FAILED", "check the CA file"),
    ],
)
def test_it_is_said_in_front_of_grpcs_words(message: str, words: str) -> None:
    told = explain_connection(message)
    assert words in told
    assert told.endswith(f"({message})")


def test_other_words_stay_as_they_are() -> None:
    assert explain_connection("The store says: Connection refused") == "The store says: Connection refused"
