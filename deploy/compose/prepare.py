"""Makes what the services of deploy/compose.yaml need before they start: secrets, settings, folders that are theirs.

Secrets are made once and kept in the volume `secrets`; the settings are written anew at each start.
"""

import json
import os
import secrets
from pathlib import Path
from typing import Any

HOME = Path("/run/lathe")
USER = 10001
SERVICES = ("accounts", "datasets", "models", "jobs", "gateway")
ADDRESSES = {f"{name}_address": f"{name}:7460" for name in SERVICES}
# Which other services each one calls.
CALLS = {
    "gateway": ("accounts", "datasets", "models", "jobs"),
    "jobs": ("accounts", "datasets", "models"),
    "datasets": ("models",),
}


def kept(name: str, length: int = 32, prefix: str = "") -> str:
    """A secret that is made once."""
    path = HOME / "secrets" / name
    if not path.exists():
        part = path.with_suffix(".part")
        part.write_text(prefix + secrets.token_hex(length))
        part.rename(path)
    return path.read_text()


def store() -> dict[str, Any]:
    """SeaweedFS, as settings."""
    return {
        "kind": "s3",
        "endpoint": "seaweedfs:8333",
        "bucket": "lathe",
        "secure": False,
        "access_key": kept("s3-access-key", 10),
        "secret_key": kept("s3-secret-key"),
    }


def settings(service: str) -> dict[str, Any]:
    """The settings of one service, by their names in its settings class."""
    tokens = {"service_token_file": str(HOME / "secrets" / "service-token")}
    if service in ("jobs", "engine"):
        tokens["engine_token_file"] = str(HOME / "secrets" / "engine-token")
    found: dict[str, Any] = {"rpc": {"host": "0.0.0.0", **tokens}, "metrics": {"host": "0.0.0.0"}}
    found |= {f"{name}_address": ADDRESSES[f"{name}_address"] for name in CALLS.get(service, ())}
    if service in SERVICES:
        password = kept(f"postgres-{service}")
        found["db"] = {"url": f"postgresql+psycopg://{service}:{password}@postgres:5432/{service}"}
    if service in ("gateway", "datasets", "models", "engine"):
        found["store"] = store()
    if service in ("gateway", "datasets", "engine"):
        found["cache_folder"] = "/var/lib/lathe/jobs/cache" if service == "engine" else "/var/cache/lathe"
    match service:
        case "accounts":
            found["bootstrap_key"] = kept("api-key", 24, "sk-lathe-")
        case "gateway":
            found["http_host"] = "0.0.0.0"
        case "jobs":
            found["jobs_address"] = ADDRESSES["jobs_address"]
            # An engine is a process beside jobs: under its name the gateway finds it.
            engine = {"LATHE_CONFIG": str(HOME / "engine.json"), "LATHE_ENGINE_RPC__HOST": "jobs"}
            found["launcher"] = {"kind": "subprocess", "folder": "/var/lib/lathe/jobs", "engine_env": engine}
    return found


def main() -> None:
    """Write everything, and give it to the user that the services run as."""
    (HOME / "secrets").mkdir(parents=True, exist_ok=True)
    passwords = {f"POSTGRES_PASSWORD_{name.upper()}": kept(f"postgres-{name}") for name in SERVICES}
    environments = {
        "postgres.env": {"POSTGRES_PASSWORD": kept("postgres"), **passwords},
        "seaweedfs.env": {
            "S3_ACCESS_KEY": store()["access_key"],
            "S3_SECRET_KEY": store()["secret_key"],
            "S3_BUCKET": store()["bucket"],
        },
    }
    for token in ("service-token", "engine-token"):
        kept(token)
    for name, values in environments.items():
        (HOME / name).write_text("".join(f"{key}={value}\n" for key, value in values.items()))
    for service in (*SERVICES, "engine"):
        # YAML takes JSON as it is.
        (HOME / f"{service}.json").write_text(json.dumps(settings(service), indent=2))
    for folder in (
        HOME,
        Path("/var/lib/lathe/postgres"),
        Path("/var/lib/lathe/seaweedfs"),
        Path("/var/lib/lathe/jobs"),
    ):
        folder.mkdir(parents=True, exist_ok=True)
        for path in (folder, *(folder.rglob("*") if folder == HOME else ())):
            os.chown(path, USER, USER)
            if folder == HOME:
                path.chmod(0o700 if path.is_dir() else 0o600)


if __name__ == "__main__":
    main()
