"""What a Hugging Face folder must be to become a base model, and what is left out of it.

Only files are read here, as data: JSON, safetensors headers and text. Nothing needs torch or transformers.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from lathe.common.errors import InvalidArgument
from lathe.engine.jsonfile import read_object
from lathe.engine.sources import first_line

WEIGHT_INDEX = "model.safetensors.index.json"
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
_LEGAL = ("LICENSE", "LICENCE", "NOTICE")


def refuse_code(path: Path) -> None:
    for script in sorted(path.rglob("*.py")):
        raise InvalidArgument(
            f"{script.relative_to(path)} is code that the model would run; Lathe runs none: "
            "import a model of a built-in architecture, without its .py files",
            reason="REMOTE_CODE",
        )
    for name in ("config.json", "tokenizer_config.json"):
        if (path / name).is_file() and "auto_map" in read_json(path, name):
            raise InvalidArgument(
                f"{name} has auto_map: this model needs code of its own, which Lathe does not run; "
                "convert it to an architecture that transformers has built in and save it with safetensors",
                reason="REMOTE_CODE",
            )


def read_json(path: Path, name: str) -> dict[str, Any]:
    if not (path / name).is_file():
        adapter = (
            " (it is a LoRA adapter, not a base model)" if (path / "adapter_config.json").is_file() else ""
        )
        raise InvalidArgument(
            f"{path} has no {name}{adapter}: a base model is a Hugging Face folder with {name}"
        )
    return read_object(path / name)


def write_json(path: Path, content: dict[str, Any]) -> None:
    text = json.dumps(content, indent=2, ensure_ascii=False, sort_keys=True) + "\n"
    path.write_text(text, encoding="utf-8", newline="\n")


def clean_config(config: dict[str, Any]) -> dict[str, Any]:
    """Without what names the machine or the library's version, so that equal models have equal digests."""
    if "quantization_config" in config:
        raise InvalidArgument(
            "config.json has quantization_config: Lathe tunes plain weights; "
            "import the original model, or a GGUF file, which is dequantised"
        )
    return {key: v for key, v in config.items() if key not in ("_name_or_path", "_model_name_or_path")}


def clean_tokenizer_config(config: dict[str, Any]) -> dict[str, Any]:
    dropped = ("chat_template", "is_local", "local_files_only", "name_or_path")
    return {key: value for key, value in config.items() if key not in dropped}


def chat_template(path: Path, tokenizer_config: dict[str, Any]) -> str:
    """chat_template.jinja, else tokenizer_config's own (the one named "default" where there are several); empty for
    a model that only completes text."""
    template = tokenizer_config.get("chat_template")
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
    if (path / "chat_template.jinja").is_file():
        template = (path / "chat_template.jinja").read_text(encoding="utf-8")
    return template if isinstance(template, str) and template.strip() else ""


def write_template(folder: Path, template: str) -> None:
    """Nothing for an empty one."""
    if template:
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8", newline="\n")


def weight_files(path: Path) -> dict[str, str]:
    """Weight files to copy, name -> name in the clean folder; each is whole as far as its header tells."""
    if (path / WEIGHT_INDEX).is_file():
        weight_map = read_json(path, WEIGHT_INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise InvalidArgument(f"{WEIGHT_INDEX} has no weight_map")
        shards = sorted({str(shard) for shard in weight_map.values()})
        names = {shard: shard for shard in shards}
    else:
        found = sorted(file.name for file in path.glob("*.safetensors"))
        if not found:
            _refuse_no_weights(path)
        if "model.safetensors" not in found and len(found) > 1:
            raise InvalidArgument(
                f"{path} holds {', '.join(found)} and no {WEIGHT_INDEX} that says how they belong together"
            )
        names = {"model.safetensors" if "model.safetensors" in found else found[0]: "model.safetensors"}
    for name in names:
        if Path(name).name != name:
            raise InvalidArgument(f"{WEIGHT_INDEX} names {name!r}, which is outside the folder")
        _check_safetensors(path / name)
    return names


def _refuse_no_weights(path: Path) -> None:
    pickles = sorted(file.name for file in path.iterdir() if file.suffix in _PICKLES)
    if pickles:
        raise InvalidArgument(
            f"{pickles[0]} is a pickle, which can run code when it is read, and no safetensors are beside "
            "it: convert the weights with safetensors (a current transformers' save_pretrained writes them) "
            "and import again",
            reason="PICKLE_WEIGHTS",
        )
    raise InvalidArgument(f"{path} has no *.safetensors weights; pickled weights are never fetched or read")


def _check_safetensors(file: Path) -> None:
    """Header and length agree: what a download that was cut off gets wrong.

    Layout (safetensors' format page): 8 bytes little-endian header length, a JSON header, the tensors' bytes.
    """
    if not file.is_file():
        raise InvalidArgument(f"{file.name} is named in {WEIGHT_INDEX} and missing")
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > min(size - 8, 100_000_000):
            raise InvalidArgument(f"{file.name} is not a safetensors file, or was cut short; fetch it again")
        try:
            header: dict[str, dict[str, Any]] = json.loads(stream.read(length))
            ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
            raise InvalidArgument(
                f"{file.name} has no valid safetensors header: {first_line(error)}"
            ) from error
    if not ends or max(ends) + 8 + length != size:
        raise InvalidArgument(
            f"{file.name} is {size} bytes long and its header says otherwise; fetch it again"
        )


def legal_files(path: Path) -> list[str]:
    return sorted(f.name for f in path.iterdir() if f.is_file() and f.name.upper().startswith(_LEGAL))


def licence_of(path: Path) -> str:
    """From the model card's front matter (`license:`), else known from the licence file, else "unknown"."""
    card = path / "README.md"
    if card.is_file():
        text = card.read_text(encoding="utf-8", errors="replace")
        front = text.split("\n---", 1)[0] if text.startswith("---") else ""
        if found := re.search(r"^license:\s*['\"]?([\w.+-]+)", front, re.MULTILINE):
            return spdx(found[1])
    for name in legal_files(path):
        head = (path / name).read_text(encoding="utf-8", errors="replace")[:2000]
        if "Apache License" in head and "Version 2.0" in head:
            return "Apache-2.0"
        if "MIT License" in head:
            return "MIT"
    return "unknown"


def spdx(licence: str) -> str:
    return {"apache-2.0": "Apache-2.0", "mit": "MIT"}.get(licence.lower(), licence)
