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

from tryout_common import Server, refuse, setting, volume

_CONFIG = Path("/tmp/tryout-seaweedfs.json")
_READY = Path("/tmp/tryout-seaweedfs.ready")
_BUCKET_NAME = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")
_START_S = 60.0


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
    # weed waits ten seconds by default for a load balancer to forget it; here is none.
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
        *("-master.volumeSizeLimitMB=256", "-volume.max=1000", "-volume.preStopSeconds=0"),
    ]


def _make_bucket(server: Server, bucket: str) -> None:
    """Make the bucket if there is none; returns at once when the server is gone."""
    deadline = time.monotonic() + _START_S
    said = ""
    while server.runs:
        shell = subprocess.run(
            ["weed", "shell", "-master=127.0.0.1:9333", "-filer=127.0.0.1:8888"],
            input=f"s3.bucket.create -name {bucket}\n",
            text=True,
            capture_output=True,
            check=False,
            timeout=_START_S,
        )
        said = (shell.stdout + shell.stderr).strip()
        if "create bucket under /buckets" in said or "already exists" in said:
            _READY.touch()
            return
        if time.monotonic() > deadline:
            print(f"The bucket {bucket} could not be made: {said[-500:]}", file=sys.stderr, flush=True)
            return
        time.sleep(0.2)


if __name__ == "__main__":
    main()
