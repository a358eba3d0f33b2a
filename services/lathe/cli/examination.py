"""What `lathe doctor` does: look from outside, step by step, then have the platform look at itself."""

from __future__ import annotations

import ssl
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from lathe import __version__
from lathe.cli.connection import Target, client_for
from lathe.cli.output import enum_word
from lathe.cli.outside import (
    HttpInfo,
    certificate_expiry,
    connect,
    fetch_info,
    guessed_http,
    resolve,
    speaks_tls,
    split_address,
)
from lathe.client import Client
from lathe.common.diagnosis import Finding, clock_finding
from lathe.common.errors import InvalidArgument, LatheError, PermissionDenied, Unauthenticated, Unimplemented
from lathe.v1 import accounts_pb2
from lathe.v1 import diagnosis_pb2 as pb

OUTSIDE = "outside"
_STEP_S = 3.0
_INSIDE_S = 20.0
_EXPIRES_SOON = timedelta(days=14)


@dataclass(frozen=True, slots=True)
class Checked:
    """A finding and where it was made: `outside`, or the service that it is about."""

    where: str
    finding: Finding


def examine(target: Target, now: Callable[[], datetime] = lambda: datetime.now(UTC)) -> Iterator[Checked]:
    """Every finding, as it is made. What depends on a step that failed is left out: it would only say it again."""
    for finding in _network(target, now()):
        yield Checked(OUTSIDE, finding)
        if not finding.ok:
            return
    with client_for(target, _INSIDE_S) as client:
        health = _health(client, target)
        yield Checked(OUTSIDE, health)
        key = _key(client) if health.ok else None
        if key is not None:
            yield Checked(OUTSIDE, key)
        inside = None
        if key is not None and key.ok:
            begun = now()
            inside, refusal = _inside(client)
            if refusal is not None:
                yield Checked("inside", refusal)
            if inside is not None:
                time = inside.time.ToDatetime(tzinfo=UTC)
                yield Checked(OUTSIDE, clock_finding("clock", "the platform", time, begun, now()))
    url = target.http or guessed_http(target.address, target.tls)
    info = fetch_info(url, target.ca_file, _STEP_S)
    yield Checked(OUTSIDE, http_finding(url, info, known=bool(target.http)))
    version = inside.version if inside is not None else info.version
    if version:
        yield Checked(OUTSIDE, version_finding(version))
    if inside is not None:
        yield from (Checked(one.service or "platform", finding_of(one)) for one in inside.findings)


def _network(target: Target, now: datetime) -> Iterator[Finding]:
    """Name, port, certificate."""
    host, _ = split_address(target.address)
    try:
        found = ", ".join(resolve(host)[:3])
        yield Finding(
            "name", True, f"{host} is {found}." if found != host.strip("[]") else f"{host} is an address."
        )
    except OSError as error:
        yield Finding(
            "name",
            False,
            f"{host} has no address ({error.strerror}).",
            "Check the name, and this machine's DNS.",
        )
        return
    try:
        connect(target.address, _STEP_S)
        yield Finding("port", True, f"{target.address} accepts connections.")
    except OSError as error:
        why = error.strerror or str(error) or "it does not answer"
        advice = (
            "Check the address; in a cluster see the Service and its pods (`lathe doctor --kubernetes NAMESPACE`), "
            "or forward the port: kubectl port-forward svc/NAME-gateway 7460 8080."
        )
        yield Finding("port", False, f"{target.address} accepts no connection: {why}.", advice)
        return
    if target.tls:
        yield _certificate(target, now)


def _certificate(target: Target, now: datetime) -> Finding:
    try:
        return expiry_finding(certificate_expiry(target.address, target.ca_file, _STEP_S), now)
    except InvalidArgument as error:
        return Finding(
            "tls", False, error.message, "Correct --ca-file, LATHE_CA_FILE or the context's ca_file."
        )
    except ssl.SSLCertVerificationError as error:
        message = f"Its certificate is not trusted: {error.verify_message}."
        return Finding(
            "tls", False, message, "Give its authority with --ca-file, or a name that the certificate has."
        )
    except ssl.SSLError as error:
        message = f"It does not speak TLS as expected ({error.reason or error})."
        return Finding("tls", False, message, "Leave out --tls if the platform has no certificate.")
    except OSError as error:
        return Finding("tls", False, f"The TLS handshake failed: {error.strerror or error}.", "Try again.")


def expiry_finding(ends: datetime, now: datetime) -> Finding:
    """Whether a certificate that is trusted will go on being so."""
    message = f"Its certificate is trusted and ends on {ends:%Y-%m-%d}."
    soon = ends - now < _EXPIRES_SOON
    return Finding("tls", True, message, "Renew it: it is taken up without a restart." if soon else "")


def _health(client: Client, target: Target) -> Finding:
    try:
        client.check(timeout=_STEP_S)
    except LatheError as error:
        if not target.tls and speaks_tls(target.address, _STEP_S):
            return Finding(
                "grpc", False, "It answers TLS only.", "Add --tls, and --ca-file for an authority of its own."
            )
        advice = "See whether it is Lathe's gRPC port, and the gateway's log."
        return Finding("grpc", False, f"gRPC does not answer: {error.message}", advice)
    return Finding("grpc", True, "gRPC answers, and the gateway says that it serves.")


def _key(client: Client) -> Finding:
    try:
        caller = client.caller()
    except Unauthenticated as error:
        return Finding(
            "key", False, f"The key is refused: {error.message}", "Log in again with a key that works."
        )
    except LatheError as error:
        return Finding(
            "key", False, f"The key cannot be checked: {error.message}", "See accounts and its database."
        )
    role = enum_word(accounts_pb2.Role.DESCRIPTOR, caller.role)
    return Finding("key", True, f"The key works: {role} of {caller.project}.")


def _inside(client: Client) -> tuple[pb.PlatformDiagnosis | None, Finding | None]:
    try:
        return client.diagnose(timeout=_INSIDE_S), None
    except PermissionDenied as error:
        advice = "Use a key of an admin of the project default, such as the first key."
        return None, Finding("inside", True, f"Nothing is known from inside: {error.message}", advice)
    except Unimplemented:
        message = "The platform cannot examine itself: it is older than this command."
        return None, Finding("inside", True, message, "Upgrade the platform.")
    except LatheError as error:
        message = f"The platform cannot examine itself: {error.message}"
        return None, Finding("inside", False, message, "See the gateway's log.")


def http_finding(url: str, info: HttpInfo, *, known: bool) -> Finding:
    """Whether the OpenAI door answers. known: its URL was given, not guessed."""
    if info.version:
        return Finding("http", True, f"The OpenAI API answers at {url}/v1.")
    message = f"The OpenAI API does not answer at {url}: {info.problem}."
    if known:
        return Finding("http", False, message, "Check the URL and the way to the gateway's port 8080.")
    return Finding("http", True, message, "If it is elsewhere, say where: lathe doctor --http URL.")


def version_finding(version: str) -> Finding:
    """Whether this command and the platform are of one version."""
    if version == __version__:
        return Finding("version", True, f"The platform and this command are both {version}.")
    message = f"The platform is {version}, this command is {__version__}."
    return Finding("version", True, message, "Install the same version of both, or something may be missing.")


def finding_of(message: pb.DiagnosisFinding) -> Finding:
    """A finding that came from inside."""
    ok = message.severity in (pb.DIAGNOSIS_SEVERITY_OK, pb.DIAGNOSIS_SEVERITY_WARNING)
    return Finding(message.name, ok, message.message, message.advice)
