"""Why a database is away, in words for the one who runs it.

Users hear only that it cannot be reached: addresses and user names are nobody else's business. A service that cannot
start, and the doctor, say more.
"""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class OutageReason:
    """why: a sentence without its subject (`refuses the password of user "accounts"`). advice: what to do."""

    why: str
    advice: str


# What PostgreSQL and its driver say; the first match wins. {0} is what they say it about.
_KNOWN = (
    (r'password authentication failed for user "([^"]*)"', 'refuses the password of user "{0}"', "url"),
    (r"no password supplied", "wants a password", "url"),
    (r'role "([^"]*)" does not exist', 'knows no user "{0}"', "url"),
    (r'database "([^"]*)" does not exist', 'does not exist on its server ("{0}")', "create"),
    (r"no pg_hba.conf entry for ([^\n]*)", "is not open to us (pg_hba.conf has no entry for {0})", "rights"),
    (r"failed to resolve host '([^']*)'", 'cannot be found: the host "{0}" is not known', "url"),
    (
        r'server at "([^"]*)"[^\n]*, port (\d+) failed: Connection refused',
        "cannot be reached: nothing listens on {0}:{1}",
        "up",
    ),
    (r"too many (?:clients|connections)", "has no connection left", "connections"),
    (r"No space left on device|could not extend file", "cannot grow because its disk is full", "room"),
    (r"the database system is (starting up|shutting down|in recovery mode)", "is {0}", "wait"),
    (r"timeout expired|timed? ?out", "does not answer in time", "up"),
)
_ADVICE = {
    "url": "Correct {setting}.",
    "create": "Create it, or correct {setting}.",
    "rights": "Allow this host in the server's pg_hba.conf, or correct {setting}.",
    "up": "Start the database, open the network to it, or correct {setting}.",
    "connections": "Raise max_connections of the server, or lower the setting db.pool_size.",
    "room": "Give the database's volume more room.",
    "wait": "Wait a moment.",
}


def explain(said: str, setting: str) -> OutageReason:
    """What the driver's text means. setting: the variable that holds the database's URL.

    A text that nobody has met yet is passed on as it is, on one line; passwords are never part of it.
    """
    for pattern, why, advice in _KNOWN:
        found = re.search(pattern, said)
        if found is not None:
            return OutageReason(why.format(*found.groups()), _ADVICE[advice].format(setting=setting))
    line = " ".join(said.split())[:300]
    return OutageReason(
        f"cannot be used ({line})" if line else "cannot be used", _ADVICE["up"].format(setting=setting)
    )
