"""Upload a file through gRPC and through HTTP, beside one process that copies a socket with SHA-256, write and fsync.

Wall-clock seconds of the sender, until it hears that all is stored, over loopback; `lathe up` answers, with its folder
store on the same disk. That gRPC's client hashes the file counts. upload_…_vs_socket: the
median over the rounds of the ratio of rates; …_mb_s: 10^6 bytes a second, the median round.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import secrets
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

from lathe.client import Client
from tests.benchmarks.datasets.corpus import Setting
from tests.fixtures.platforms import Platform, embedded

# What /v1/files takes at most is twice this.
MEGABYTES = 256
_CHUNK = 1 << 20


def measure(setting: Setting) -> dict[str, float]:
    setting.data.mkdir(parents=True, exist_ok=True)
    rates: dict[str, list[float]] = defaultdict(list)
    with (
        tempfile.TemporaryDirectory(dir=setting.data) as temporary,
        embedded(Path(temporary)) as platform,
        Client(platform.grpc, platform.api_key) as client,
        receiver(Path(temporary) / "copy.bin") as address,
    ):
        path = Path(temporary) / "upload.bin"
        contenders: dict[str, Callable[[], None]] = {
            "socket": lambda: through_a_socket(path, address),
            "grpc": lambda: through_grpc(path, client),
            "http": lambda: through_http(path, platform),
        }
        for number in range(setting.rounds + 1):
            for name, contender in contenders.items():
                # Other bytes each time: what is stored already is not stored again.
                path.write_bytes(secrets.token_bytes(MEGABYTES * 1_000_000))
                began = time.perf_counter()
                contender()
                rate = MEGABYTES / (time.perf_counter() - began)
                settle(client)
                if number:  # the first round opens connections and imports modules
                    rates[name].append(rate)
    figures = {f"upload_{name}_mb_s": statistics.median(found) for name, found in rates.items()}
    for name in ("grpc", "http"):
        pairs = zip(rates[name], rates["socket"], strict=True)
        figures[f"upload_{name}_vs_socket"] = statistics.median(ours / theirs for ours, theirs in pairs)
    return figures


def settle(client: Client) -> None:
    """Let what was uploaded be read through and deleted, so that the next contender has the machine."""
    for dataset in list(client.datasets.list()):
        client.datasets.wait(dataset.name)
        client.datasets.delete(dataset.name)
    os.sync()


@contextmanager
def receiver(target: Path) -> Iterator[tuple[str, int]]:
    """One process that receives, hashes, writes, syncs, and answers with the digest; its address."""
    command = [sys.executable, "-m", "tests.benchmarks.datasets.upload", str(target)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield "127.0.0.1", int(process.stdout.readline())
        finally:
            process.kill()


def through_a_socket(source: Path, address: tuple[str, int]) -> None:
    """The reference."""
    with (
        socket.create_connection(address) as connection,
        source.open("rb", buffering=0) as file,
    ):
        buffer = memoryview(bytearray(_CHUNK))
        while size := file.readinto(buffer):
            connection.sendall(buffer[:size])
        connection.shutdown(socket.SHUT_WR)
        assert len(connection.recv(64)) == 64


def _receive(target: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        print(listener.getsockname()[1], flush=True)
        while True:
            connection, _ = listener.accept()
            digest, buffer = hashlib.sha256(), memoryview(bytearray(_CHUNK))
            with connection, target.open("wb", buffering=0) as file:
                while size := connection.recv_into(buffer):
                    digest.update(buffer[:size])
                    file.write(buffer[:size])
                os.fsync(file.fileno())
                connection.sendall(digest.hexdigest().encode())
            target.unlink()


def through_grpc(path: Path, client: Client) -> None:
    """The public client."""
    client.datasets.upload(path, "user_data")


def through_http(path: Path, platform: Platform) -> None:
    """A form as OpenAI's SDK writes it, without the SDK's own copies."""
    boundary = "lathe-bench"
    head = (
        f'--{boundary}\r\ncontent-disposition: form-data; name="purpose"\r\n\r\nuser_data\r\n'
        f'--{boundary}\r\ncontent-disposition: form-data; name="file"; filename="a.bin"\r\n\r\n'
    ).encode()
    tail = f"\r\n--{boundary}--\r\n".encode()
    connection = http.client.HTTPConnection(urlsplit(platform.http).netloc)
    headers = {
        "authorization": f"Bearer {platform.api_key}",
        "content-type": f"multipart/form-data; boundary={boundary}",
        "content-length": str(len(head) + path.stat().st_size + len(tail)),
    }

    def body() -> Iterator[bytes]:
        yield head
        with path.open("rb", buffering=0) as file:
            while data := file.read(_CHUNK):
                yield data
        yield tail

    connection.request("POST", "/v1/files", body(), headers)
    answer = connection.getresponse()
    said = json.loads(answer.read())
    assert answer.status == 200, said
    connection.close()


if __name__ == "__main__":
    _receive(Path(sys.argv[1]))
