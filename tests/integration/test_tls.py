"""mTLS between services over loopback: who is let in, and certificates that change while processes run."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest

from lathe.common.errors import FailedPrecondition, Unavailable
from lathe.common.follow import LOOK_EVERY_S
from lathe.common.metrics import Metrics
from lathe.common.rpc.auth import ServiceAuthenticator, ServiceCredentials
from lathe.common.rpc.channel import call, connect, stream
from lathe.common.rpc.dialer import Dialer
from lathe.common.rpc.server import Registration, RpcServer, build_server
from lathe.common.rpc.tls import ClientTls
from lathe.common.settings import PeerTls, RpcSettings
from tests.fixtures.certificates import Authority, Files, mount

NAME = "lathe.v1.EchoInternalService"
AUTHORITY, STRANGER = Authority(), Authority("somebody else")
HOST = "127.0.0.1"


class Echo:
    async def unary(self, request: bytes, context: Any) -> bytes:
        return request

    async def endless(self, request: bytes, context: Any) -> AsyncIterator[bytes]:
        while True:
            yield request
            await asyncio.sleep(0.01)


def add_echo(servicer: Any, server: grpc.aio.Server) -> None:
    handlers = {
        "Unary": grpc.unary_unary_rpc_method_handler(servicer.unary),
        "Endless": grpc.unary_stream_rpc_method_handler(servicer.endless),
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(NAME, handlers),))


@asynccontextmanager
async def serving(files: Files | None, token: Path, **settings: Any) -> AsyncIterator[RpcServer]:
    tls = (
        {"tls_cert_file": files.cert, "tls_key_file": files.key, "tls_client_ca_file": files.ca}
        if files is not None
        else {}
    )
    server = build_server(
        [Registration(add_echo, Echo(), NAME)],
        RpcSettings(port=0, health_port=None, grace_s=0.2, **tls, **settings),
        ServiceAuthenticator(ServiceCredentials.from_files(token, None)),
        Metrics(),
    )
    await server.start()
    try:
        yield server
    finally:
        await server.stop()


@pytest.fixture
def token(tmp_path: Path) -> Path:
    path = tmp_path / "token"
    path.write_text("secret")
    return path


@pytest.fixture
def server_files(tmp_path: Path) -> Files:
    return AUTHORITY.mount(tmp_path / "server", [HOST, "engine.lathe.internal"])


@pytest.fixture
def client_files(tmp_path: Path) -> Files:
    return AUTHORITY.mount(tmp_path / "client", ["gateway"])


@pytest.fixture
def strange_files(tmp_path: Path) -> Files:
    return STRANGER.mount(tmp_path / "strange", [HOST])


@pytest.fixture
async def server(server_files: Files, token: Path) -> AsyncIterator[RpcServer]:
    async with serving(server_files, token) as running:
        yield running


def tls(files: Files, **changes: Any) -> ClientTls:
    return replace(ClientTls(files.ca, files.cert, files.key), **changes)


async def echo(channel: grpc.aio.Channel) -> bytes:
    return await call(channel.unary_unary(f"/{NAME}/Unary"), b"x", timeout=30.0)


async def ask(port: int, how: ClientTls | None) -> bytes:
    async with connect(f"{HOST}:{port}", "secret", how) as channel:
        return await echo(channel)


async def test_services_that_know_each_other(server: RpcServer, client_files: Files, token: Path) -> None:
    peers = PeerTls(ca_file=client_files.ca, cert_file=client_files.cert, key_file=client_files.key)
    dialer = Dialer.of_service(RpcSettings(peers=peers, service_token_file=token))
    target = f"{HOST}:{server.port}"
    for channel in (dialer.connect(target), dialer.connect_engine(target)):
        async with channel:
            assert await echo(channel) == b"x"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda own, strange: tls(own, cert_file=None, key_file=None), "takes no certificate of this side"),
        (lambda own, strange: tls(strange, ca_file=own.ca), "takes no certificate of this side"),
        (lambda own, strange: tls(own, ca_file=strange.ca), "check the CA file"),
        (lambda own, strange: tls(own, server_name="jobs"), "not for the name"),
        (lambda own, strange: None, "one side speaks TLS and the other does not"),
    ],
)
async def test_who_is_refused_and_why(
    change: Callable[[Files, Files], ClientTls | None],
    message: str,
    server: RpcServer,
    client_files: Files,
    strange_files: Files,
) -> None:
    with pytest.raises(Unavailable, match=message):
        await ask(server.port, change(client_files, strange_files))


async def test_a_server_without_tls_is_told_from_one_that_is_away(client_files: Files, token: Path) -> None:
    async with serving(None, token) as server:
        with pytest.raises(Unavailable, match="does not speak TLS"):
            await ask(server.port, tls(client_files))


async def test_both_sides_follow_their_files_and_running_calls_go_on(
    tmp_path: Path, server: RpcServer, client_files: Files
) -> None:
    new = Authority("the new one")
    both = AUTHORITY.pem + new.pem
    async with connect(f"{HOST}:{server.port}", "secret", tls(client_files)) as channel:
        running = stream(channel.unary_stream(f"/{NAME}/Endless"), b"x")
        assert await anext(running) == b"x"
        # As it is done in a cluster: both authorities first, then the certificates, then the new authority alone.
        for authorities, issuer in ((both, AUTHORITY), (both, new), (new.pem, new)):
            for folder, names in (("server", [HOST]), ("client", ["gateway"])):
                certificate, key = issuer.issue(names)
                contents = {"ca.crt": authorities, "tls.crt": certificate, "tls.key": key}
                mount(tmp_path / folder, contents)
            await asyncio.sleep(LOOK_EVERY_S + 0.1)
            assert await ask(server.port, tls(client_files)) == b"x"
            assert await echo(channel) == b"x"
        old = AUTHORITY.mount(tmp_path / "old", ["gateway"])
        with pytest.raises(Unavailable, match="takes no certificate"):
            await ask(server.port, tls(old, ca_file=client_files.ca))
        for _ in range(50):
            assert await anext(running) == b"x"
        await running.aclose()


async def test_a_broken_new_pair_is_named_and_the_old_one_stays(
    tmp_path: Path,
    server: RpcServer,
    server_files: Files,
    client_files: Files,
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with connect(f"{HOST}:{server.port}", "secret", tls(client_files)) as channel:
        for folder in ("server", "client"):
            contents = {"ca.crt": AUTHORITY.pem, "tls.crt": AUTHORITY.issue([HOST])[0], "tls.key": b"half"}
            mount(tmp_path / folder, contents)
        await asyncio.sleep(LOOK_EVERY_S + 0.1)
        assert await echo(channel) == b"x"
        right = AUTHORITY.mount(tmp_path / "right", ["gateway"])
        assert await ask(server.port, tls(right)) == b"x"
        assert str(server_files.key) in caplog.text
        assert str(client_files.key) in caplog.text


async def test_wrong_files_at_the_start_are_one_sentence(
    tmp_path: Path, server_files: Files, client_files: Files, token: Path
) -> None:
    with pytest.raises(FailedPrecondition, match=f"{client_files.cert} and {server_files.key}"):
        connect("localhost:1", "secret", tls(client_files, key_file=server_files.key))
    with pytest.raises(FailedPrecondition, match=r"missing.*cannot be read"):
        connect("localhost:1", "secret", tls(client_files, ca_file=tmp_path / "missing"))
    with pytest.raises(FailedPrecondition, match=f"{token} holds no PEM certificate of an authority"):
        async with serving(replace(server_files, ca=token), token):
            raise AssertionError("it started")
