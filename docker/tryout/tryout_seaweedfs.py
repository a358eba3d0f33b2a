#!/usr/bin/env python3
"""SeaweedFS as an S3 service with one bucket, for trying out and for tests.

Environment: S3_ACCESS_KEY, S3_SECRET_KEY, S3_BUCKET. Data: /var/lib/lathe/seaweedfs, or S3_DATA.
Port: 8333, or S3_PORT.
Everything but S3 listens on the loopback address alone. `tryout-seaweedfs --ready` says whether the bucket is there.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from urllib.request import urlopen

from tryout_common import Server, refuse, setting, volume

_CONFIG = Path("/tmp/tryout-seaweedfs.json")
_READY = Path("/tmp/tryout-seaweedfs.ready")
_SAID = Path("/tmp/tryout-seaweedfs.said")
_BUCKET_NAME = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")
_START_S = 60.0
_SHELL_S = 5.0
_PAUSE_S = 0.1


def main() -> None:
    """Serve the volume until SIGTERM."""
    if sys.argv[1:] == ["--ready"]:
        sys.exit(not _READY.exists())
    access = setting("S3_ACCESS_KEY", "the access key")
    secret = setting("S3_SECRET_KEY", "the secret key")
    bucket = setting("S3_BUCKET", "the bucket's name")
    if not _BUCKET_NAME.fullmatch(bucket):
        refuse(f"S3_BUCKET is {bucket!r}, which is no bucket's name: 3 to 63 of a-z, 0-9, '-' and '.'.")
    data = volume(Path(os.environ.get("S3_DATA", "/var/lib/lathe/seaweedfs")))
    _READY.unlink(missing_ok=True)
    _CONFIG.touch(mode=0o600)
    _CONFIG.write_text(json.dumps(identities(access, secret)))
    server = Server(command(data, os.environ.get("S3_PORT", "8333")), data, stop=signal.SIGTERM)
    _make_bucket(server, bucket)
    server.wait("SeaweedFS", data)


def identities(access: str, secret: str) -> dict[str, object]:
    """Who may do what: one caller, everything."""
    who = {"accessKey": access, "secretKey": secret}
    actions = ["Admin", "Read", "Write", "List", "Tagging"]
    return {"identities": [{"name": "lathe", "credentials": [who], "actions": actions}]}


def command(data: Path, port: str) -> list[str]:
    """weed's command line: one master, one volume server, one filer, S3 for everybody."""
    return [
        *("weed", "-logtostderr=true", "server", f"-dir={data}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1"),
        *("-s3", f"-s3.config={_CONFIG}", "-s3.ip.bind=0.0.0.0", f"-s3.port={port}"),
        *("-s3.port.iceberg=0", "-s3.port.lance=0", "-master.telemetry=false"),
        # A master that starts again waits so long for others before it leads: ten seconds by default, for nobody.
        *("-master.electionTimeout=1s", "-master.volumeSizeLimitMB=256", "-volume.max=1000"),
        # By default the volume server waits ten seconds for a load balancer to forget it; here is none.
        "-volume.preStopSeconds=0",
    ]


def _make_bucket(server: Server, bucket: str) -> None:
    """Make the bucket if there is none, and wait until it takes data; returns at once when the server ends."""
    deadline = time.monotonic() + _START_S
    said = "SeaweedFS did not answer"
    while server.runs and time.monotonic() < deadline:
        said = _shell(server, f"s3.bucket.create -name {bucket}\n") or said
        if "create bucket under" in said or "already exists" in said:
            break
        time.sleep(_PAUSE_S)
    while server.runs and time.monotonic() < deadline:
        if _takes_data(bucket):
            _READY.touch()
            return
        time.sleep(_PAUSE_S)
    if server.runs:
        print(f"The bucket {bucket} could not be made: {said[-500:]}", file=sys.stderr, flush=True)


def _takes_data(bucket: str) -> bool:
    """Whether a volume is there for the bucket's objects: the volume server joins seconds after the rest."""
    try:
        with urlopen(f"http://127.0.0.1:9333/dir/assign?collection={bucket}", timeout=_SHELL_S) as answer:
            return "fid" in json.load(answer)
    except (OSError, ValueError):
        # Not yet: the master says so with an HTTP error.
        return False


def _shell(server: Server, command: str) -> str:
    """What `weed shell` says to a command; nothing if it took too long or the server went away meanwhile."""
    where = ["-master=127.0.0.1:9333", "-filer=127.0.0.1:8888"]
    with _SAID.open("w+") as said:
        shell = subprocess.Popen(
            ["weed", "shell", *where], stdin=subprocess.PIPE, stdout=said, stderr=said, text=True
        )
        assert shell.stdin is not None
        shell.stdin.write(command)
        shell.stdin.close()
        deadline = time.monotonic() + _SHELL_S
        while shell.poll() is None and server.runs and time.monotonic() < deadline:
            time.sleep(_PAUSE_S)
        if shell.poll() is None:
            shell.kill()
        shell.wait()
        said.seek(0)
        return said.read().strip()


if __name__ == "__main__":
    main()
