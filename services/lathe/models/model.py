"""What models is about: base models, adapters, and the rules that need nothing from outside."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from pathlib import PurePosixPath
from typing import Any

from lathe.common.errors import FieldViolation, InvalidArgument, LatheError

MAX_FILES = 2000
MAX_TEXT = 512

_BASE_MODEL_ID = re.compile(r"[a-z0-9._-]{1,63}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_PATH_SEGMENT = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+@=-]*")
_TUNED_ID = re.compile(
    r"ft:(?P<base>[a-z0-9._-]+):(?P<project>[a-z0-9-]+):(?P<suffix>[A-Za-z0-9_-]*):(?P<id>[A-Za-z0-9_-]+)"
    r"(:ckpt-step-(?P<step>[0-9]+))?"
)

_PICKLES = frozenset(
    {".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib", ".npy", ".npz", ".h5", ".msgpack"}
)
_CODE = frozenset({".py", ".pyc", ".pyd", ".so", ".dll", ".dylib", ".sh", ".exe", ".ipynb"})
_ALLOWED = frozenset({".safetensors", ".json", ".jinja", ".txt", ".model", ".md"})
_LEGAL = ("LICENSE", "LICENCE", "NOTICE", "COPYING", "USE_POLICY")


class BaseModelState(StrEnum):
    """UPLOADING until every file is there and has been checked. DELETING is never shown."""

    UPLOADING = "uploading"
    READY = "ready"
    DELETING = "deleting"


@dataclass(frozen=True, slots=True)
class ModelFile:
    """One file of a base model. `stored`: its bytes are in the object store under `object_key`."""

    path: str
    size_bytes: int
    sha256: str
    stored: bool = False

    @property
    def object_key(self) -> str:
        return file_key(self.sha256)


@dataclass(frozen=True, slots=True)
class Facts:
    """What the check of a whole folder found. Empty while it is being uploaded."""

    tokenizer_digest: str = ""
    template_digest: str = ""
    architecture: str = ""
    parameter_count: int = 0
    context_length: int = 0
    tunable: bool = False
    not_tunable_reason: str = ""
    methods: tuple[str, ...] = ()
    target_modules: tuple[str, ...] = ()
    chat_template: str = ""


@dataclass(frozen=True, slots=True)
class BaseModel:
    """Pretrained weights, tokenizer and chat template that an operator registered."""

    id: str
    display_name: str
    state: BaseModelState
    digest: str
    files: tuple[ModelFile, ...]
    license: str
    training_cutoff: str
    source: str
    create_time: datetime
    facts: Facts = Facts()

    @property
    def name(self) -> str:
        return f"baseModels/{self.id}"

    def file(self, path: str) -> ModelFile | None:
        """The file at `path`, None if the model has none there."""
        return next((file for file in self.files if file.path == path), None)


@dataclass(frozen=True, slots=True)
class AdapterObject:
    """Where an adapter's files are: PEFT's folder under `prefix`, listed with digests by its manifest.json."""

    prefix: str
    manifest_sha256: str


@dataclass(frozen=True, slots=True)
class Lineage:
    """What an adapter was made from.

    parent_model_id: the tuned model whose adapter its job started from, with that adapter's manifest.
    """

    job: str
    attempt: str
    step: int
    dataset_sha256: str
    audit_key: str
    base_digest: str
    hyperparameters_json: str
    seed: int
    code_version: str
    method: str = "supervised"
    parent_model_id: str = ""
    parent_manifest_sha256: str = ""


@dataclass(frozen=True, slots=True)
class Adapter:
    """A registered adapter. model_id: what clients write as `model`."""

    project: str
    id: str
    model_id: str
    base_model: str
    object: AdapterObject
    lineage: Lineage
    create_time: datetime
    is_final: bool

    @property
    def name(self) -> str:
        return f"projects/{self.project}/adapters/{self.id}"


@dataclass(frozen=True, slots=True)
class TunedId:
    """The parts of `ft:<base>:<project>:<suffix>:<id>[:ckpt-step-N]`; step is None for a final model."""

    base: str
    project: str
    suffix: str
    id: str
    step: int | None


def file_key(sha256: str) -> str:
    """Where a model file lies.

    Apart from the datasets' `blobs/<sha256>`: a user who uploads a copy of a model file as a dataset and deletes
    it must not delete the model's.
    """
    return f"basemodels/files/{sha256}"


def manifest_key(digest: str) -> str:
    """Where an engine, which knows only the digest, finds the list of files."""
    return f"basemodels/{digest}.json"


def manifest(model: BaseModel) -> bytes:
    """The list of the files that matter, as canonical JSON: the same for every import of one digest."""
    files = [
        {"path": file.path, "size": file.size_bytes, "sha256": file.sha256, "object_key": file.object_key}
        for file in sorted(model.files, key=lambda file: file.path)
        if matters(file.path)
    ]
    content = {"digest": model.digest, "files": files}
    return json.dumps(content, sort_keys=True, separators=(",", ":")).encode()


def parse_tuned_id(model_id: str) -> TunedId | None:
    """The parts of a tuned model's id, None if it has another shape."""
    match = _TUNED_ID.fullmatch(model_id)
    if match is None:
        return None
    step = match["step"]
    return TunedId(
        match["base"], match["project"], match["suffix"], match["id"], None if step is None else int(step)
    )


def matters(path: str) -> bool:
    """Whether a file changes what the model answers; licences and read-me files do not."""
    name = PurePosixPath(path).name
    return PurePosixPath(path).suffix in (".safetensors", ".json", ".jinja", ".model") or name in (
        "merges.txt",
        "vocab.txt",
    )


def folder_digest(files: Iterable[ModelFile]) -> str:
    """SHA-256 over the sorted (path, sha256) of the files that matter, as canonical JSON."""
    pairs = sorted([file.path, file.sha256] for file in files if matters(file.path))
    return hashlib.sha256(json.dumps(pairs, separators=(",", ":")).encode()).hexdigest()


def check_base_model_id(base_model_id: str) -> None:
    """Raise InvalidArgument unless it is 1 to 63 of [a-z0-9._-], beginning with a letter or digit."""
    if not _BASE_MODEL_ID.fullmatch(base_model_id) or base_model_id[0] in "._-":
        raise invalid(
            "base_model_id",
            f"base_model_id {base_model_id!r} must be 1 to 63 of a-z, 0-9, '.', '_' and '-', "
            "beginning with a letter or digit.",
        )


def check_files(files: Sequence[ModelFile]) -> None:
    """Raise InvalidArgument, naming the file, unless the list is that of a folder Lathe may store and run."""
    where = "base_model.files"
    if not files:
        raise invalid(where, "base_model.files is empty; list every file of the Hugging Face folder.")
    if len(files) > MAX_FILES:
        raise invalid(where, f"base_model.files has {len(files)} entries; at most {MAX_FILES} are taken.")
    seen: set[str] = set()
    for index, file in enumerate(files):
        _check_file(file, f"{where}[{index}]")
        if file.path in seen:
            raise invalid(f"{where}[{index}].path", f"{file.path} is listed twice.")
        seen.add(file.path)
    if not any(path.endswith(".safetensors") for path in seen):
        raise invalid(
            where, "The folder has no .safetensors file. Convert the weights to safetensors and import again."
        )
    for needed, advice in (
        ("config.json", "A Hugging Face model folder has one beside its weights."),
        ("tokenizer.json", "Save the tokenizer with transformers' AutoTokenizer(...).save_pretrained."),
    ):
        if needed not in seen:
            raise invalid(where, f"The folder has no {needed}. {advice}")


def _check_file(file: ModelFile, field: str) -> None:
    path = PurePosixPath(file.path)
    segments = file.path.split("/")
    if len(file.path) > 255 or not all(_PATH_SEGMENT.fullmatch(segment) for segment in segments):
        raise invalid(
            f"{field}.path",
            f"{file.path!r} is no plain relative path; '..', '/x' and hidden files are refused.",
        )
    suffix = path.suffix.lower()
    if suffix in _PICKLES:
        raise invalid(
            f"{field}.path",
            f"{file.path} is or may be a pickle, which can run code when loaded. Only safetensors weights are taken.",
        )
    if suffix in _CODE:
        raise invalid(
            f"{field}.path", f"{file.path} is code; Lathe runs none that comes with a model. Leave it out."
        )
    if suffix not in _ALLOWED and not path.name.upper().startswith(_LEGAL):
        raise invalid(f"{field}.path", f"{file.path} is of no kind that Lathe needs. Leave it out.")
    if not _SHA256.fullmatch(file.sha256):
        raise invalid(f"{field}.sha256", f"The sha256 of {file.path} must be 64 lower-case hex digits.")
    if file.size_bytes < 0 or (suffix == ".safetensors" and file.size_bytes <= 8):
        raise invalid(f"{field}.size_bytes", f"{file.path} cannot have {file.size_bytes} bytes.")


def check_texts(texts: Mapping[str, str]) -> None:
    """Raise InvalidArgument for a description (field -> text) that is too long to show."""
    for field, text in texts.items():
        if len(text) > MAX_TEXT:
            raise invalid(field, f"{field} has {len(text)} characters; at most {MAX_TEXT} fit.")


def check_adapter(adapter: Adapter) -> None:
    """Raise InvalidArgument unless id, base, project and object of a new adapter belong together."""
    tuned = parse_tuned_id(adapter.model_id)
    if tuned is None or tuned.project != adapter.project or tuned.base != adapter.base_model:
        raise invalid(
            "adapter.model_id",
            f"adapter.model_id {adapter.model_id!r} must be "
            f"'ft:{adapter.base_model}:{adapter.project}:<suffix>:<id>[:ckpt-step-N]'.",
        )
    if adapter.is_final != (tuned.step is None):
        raise invalid(
            "adapter.is_final", "A checkpoint's id ends in ':ckpt-step-N', a final adapter's does not."
        )
    if not _SHA256.fullmatch(adapter.object.manifest_sha256):
        raise invalid("adapter.object.manifest_sha256", "manifest_sha256 must be 64 lower-case hex digits.")
    segments = adapter.object.prefix.rstrip("/").split("/")
    if segments[0] != "jobs" or len(segments) < 3 or any(segment in ("", ".", "..") for segment in segments):
        raise invalid(
            "adapter.object.prefix", "adapter.object.prefix must be a folder below 'jobs/<job>/<attempt>'."
        )


def refuse_remote_code(documents: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise InvalidArgument if one of the JSON files (path -> content) asks for code of its own (`auto_map`)."""
    for path, content in documents.items():
        if "auto_map" in content:
            raise bad_folder(
                f"{path} has 'auto_map': this model needs code of its own, which Lathe does not run. "
                "Import a model of an architecture that Lathe knows."
            )


def job_folder(job: str) -> str:
    """Where all attempts of a job write; with a slash at the end."""
    return f"jobs/{job}/"


def folders_to_keep(folder: str, kept: Iterable[str]) -> set[str]:
    """`kept` without slashes at the end. Raise InvalidArgument for one that is not below `folder`."""
    found = {prefix.rstrip("/") for prefix in kept}
    for prefix in sorted(found):
        if not prefix.startswith(folder) or any(part in ("", ".", "..") for part in prefix.split("/")):
            raise invalid(
                "kept_prefixes", f"kept_prefixes has {prefix!r}, which is no folder below {folder}."
            )
    return found


def not_below(keys: Iterable[str], folders: Collection[str]) -> list[str]:
    """The keys that lie in none of the folders; manifests first, so that nothing looks whole when it is not."""
    others = (key for key in keys if not any(key.startswith(f"{folder}/") for folder in folders))
    return sorted(others, key=lambda key: (not key.endswith("/manifest.json"), key))


def invalid(field: str, message: str) -> InvalidArgument:
    """An InvalidArgument about one field of a request."""
    return InvalidArgument(message, violations=[FieldViolation(field, message)])


def bad_folder(message: str) -> LatheError:
    """The error for a folder whose content cannot be a base model."""
    return InvalidArgument(message, reason="INVALID_BASE_MODEL")
