"""What kubectl says, as `lathe doctor` passes it on."""

from lathe.cli.kubernetes import said


def test_what_kubectl_says_of_every_kind_is_said_once() -> None:
    refused = 'Error from server (Forbidden): pods is forbidden: User "me"'
    unreachable = "Unable to connect to the server: no route to host\n"
    assert said(unreachable * 6) == unreachable.strip()
    assert said(f"{refused}\n\n{unreachable}{refused}\n") == f"{refused} {unreachable.strip()}"
