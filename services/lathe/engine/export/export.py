"""The three exports. Each builds a folder beside the wanted one, checks it, and renames it when it is whole."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

import torch

from lathe.common.errors import FailedPrecondition, InvalidArgument, ResourceExhausted
from lathe.engine.adapters import WEIGHTS_FILE
from lathe.engine.export.card import model_card
from lathe.engine.export.gguf_file import GgufType, adds_bos, check_exportable, write_gguf
from lathe.engine.export.llamacpp import is_installed
from lathe.engine.export.merge import MergedModel
from lathe.engine.export.modelfile import modelfile
from lathe.engine.export.reference import LogitDifference, Reference, logit_difference
from lathe.engine.export.shards import SHARD_BYTES, write_model
from lathe.engine.export.source import Source
from lathe.engine.export.texts import Probe, default_probes, rows_of
from lathe.engine.export.verify import GgufCheck, check_gguf
from lathe.engine.hf_folder import clean_config, legal_files, write_json
from lathe.engine.lora_config import CONFIG_FILE
from lathe.engine.model import is_disk_full
from lathe.engine.sources import building

Progress = Callable[[str, int, int], None]

_BESIDE = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)
# Spared for what is written beside the weights.
_ROOM = 64_000_000


class MergedType(StrEnum):
    """What merged weights are stored as; they are always merged in float32."""

    BF16 = "bf16"
    F32 = "f32"

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self is MergedType.BF16 else torch.float32

    @property
    def bound(self) -> float:
        """The largest logit difference to base and adapter that passes, in standard deviations of a token's logits.
        float32 leaves the order of summation, bf16 the rounding of each weight to 8 bits (docs/export.md)."""
        return 0.5 if self is MergedType.BF16 else 1e-3


@dataclass(frozen=True, slots=True)
class Exported:
    """What was made. measured: figures in words by their name; warnings: to be said aloud."""

    folder: Path
    files: tuple[str, ...]
    size_bytes: int
    measured: Mapping[str, str] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()


def export_peft(source: Source, out: Path) -> Exported:
    """The adapter as PEFT loads it, read through and found to fit its base, with a model card.

    Raises InvalidArgument for a base model, an adapter that does not fit, a NaN, an `out` that is not empty.
    """
    adapter = source.adapter
    if adapter is None:
        what = "Every weight of this model was tuned: it" if source.is_full else "A base model"
        raise InvalidArgument(f"{what} has no adapter; export it as safetensors or gguf.")
    with source.tensors() as tensors:
        model = MergedModel(source.config(), tensors, adapter)
        for name in model.changed:
            model.read(name)
    usage = (
        "model = AutoModelForCausalLM.from_pretrained(BASE)\n"
        'model = PeftModel.from_pretrained(model, "this folder")'
    )
    with _folder(out, (adapter / WEIGHTS_FILE).stat().st_size) as work:
        for name in (CONFIG_FILE, WEIGHTS_FILE):
            shutil.copyfile(adapter / name, work / name)
        _write_card(source, work, "a PEFT adapter", usage, {}, peft=True)
    return _exported(out)


def export_safetensors(
    source: Source,
    out: Path,
    kind: MergedType = MergedType.BF16,
    *,
    probes: Sequence[Probe] = (),
    shard_bytes: int = SHARD_BYTES,
    progress: Progress | None = None,
) -> Exported:
    """The adapter merged into its base: a Hugging Face folder that needs no PEFT.

    probes: what the result is held against base and adapter on (default_probes if empty). Raises InvalidArgument for
    bad input, FailedPrecondition (EXPORT_DIFFERS) when logits differ by more than `kind.bound`, ResourceExhausted for
    a full disk.
    """
    tokenizer = source.tokenizer()
    rows = rows_of(tokenizer, probes or default_probes(tokenizer))
    with source.tensors() as tensors:
        model = MergedModel(source.config(), tensors, source.adapter)
        infos = model.infos()
        ours = Reference(source.weights, source.adapter)
        expected = [ours.logits(row) for row in rows]
        del ours
        size = sum(math.prod(info.shape) for info in infos) * kind.dtype.itemsize
        with _folder(out, size) as work:
            write_model(work, infos, kind.dtype, _told(model, len(infos), progress), shard_bytes=shard_bytes)
            dtype = str(kind.dtype).removeprefix("torch.")
            write_json(work / "config.json", {**clean_config(model.config), "dtype": dtype})
            _copy_beside(source, work)
            found = logit_difference(expected, Reference(work), rows)
            check_difference(found, kind)
            measured = _difference(found)
            usage = 'AutoModelForCausalLM.from_pretrained("this folder")'
            _write_card(source, work, "safetensors", usage, measured)
    return _exported(out, measured)


def check_difference(found: LogitDifference, kind: MergedType) -> None:
    """Raises FailedPrecondition (EXPORT_DIFFERS) beyond `kind.bound`, and for NaN."""
    if not found.relative <= kind.bound:
        raise FailedPrecondition(
            f"The merged model's logits differ from base and adapter by up to {found.largest:.4g}, "
            f"{found.relative:.3g} standard deviations; {kind.bound:g} are allowed for {kind}."
            + (" Export it as f32." if kind is MergedType.BF16 else ""),
            reason="EXPORT_DIFFERS",
        )


def export_gguf(
    source: Source,
    out: Path,
    kind: GgufType = GgufType.F16,
    *,
    probes: Sequence[Probe] = (),
    verify: bool = True,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Exported:
    """One GGUF file with the adapter merged in, and Ollama's Modelfile, checked by running llama.cpp.

    verify: False leaves the check out, which is a warning in the result, as is a missing xllamacpp. Raises
    InvalidArgument for what cannot be written, FailedPrecondition (EXPORT_DIFFERS) when llama.cpp does not compute the
    same, ResourceExhausted for a full disk.
    """
    tokenizer = source.tokenizer()
    context = check_exportable(source)
    checked = verify and is_installed()
    kinds = dict.fromkeys([GgufType.F16, kind] if checked else [kind])
    with source.tensors() as tensors:
        model = MergedModel(source.config(), tensors, source.adapter)
        weights = sum(math.prod(info.shape) for info in model.infos())
        with _folder(out, sum(weights * one.bytes_a_weight for one in kinds)) as work:
            files = {one: work / f"{source.name}-{one}.gguf" for one in kinds}
            for one, file in files.items():
                write_gguf(file, model, tokenizer, source, one, progress=progress)
            measured, warnings = dict[str, str](), _unchecked(verify)
            if checked:
                found = check_gguf(
                    files[GgufType.F16],
                    Reference(source.weights, source.adapter),
                    tokenizer,
                    probes or default_probes(tokenizer),
                    q8_0=files.get(GgufType.Q8_0),
                    context=context,
                    threads=threads or os.cpu_count() or 1,
                )
                measured, warnings = _figures(found), _notes(found)
            for one in kinds.keys() - {kind}:
                files[one].unlink()
            text = modelfile(files[kind].name, tokenizer, bos_added=adds_bos(tokenizer))
            (work / "Modelfile").write_text(text, encoding="utf-8")
            _copy_licences(source, work)
            usage = f"llama-cli -m {files[kind].name}\nollama create my-model -f Modelfile"
            _write_card(source, work, f"GGUF {kind}", usage, measured or {"llama.cpp": warnings[0]})
    return _exported(out, measured, warnings)


def _unchecked(asked: bool) -> tuple[str, ...]:
    if not asked:
        return ("not verified: it was asked for without a check",)
    if not is_installed():
        return ("not verified: xllamacpp is not installed (pip install 'lathe[export]')",)
    return ()


def _figures(found: GgufCheck) -> dict[str, str]:
    tied = f", {found.ties} of them ties" if found.ties else ""
    figures = {"greedy tokens equal to ours": f"{found.greedy_tokens} of {found.prompts} answers{tied}"}
    if found.mean_kl is not None:
        figures["mean KL of q8_0 to f16"] = f"{found.mean_kl:.5f} over {found.positions} tokens"
    return figures


def _notes(found: GgufCheck) -> tuple[str, ...]:
    if found.template_same:
        return ()
    return ("llama.cpp renders the chat template otherwise than Lathe does; compare what it is sent",)


def _difference(found: LogitDifference) -> dict[str, str]:
    words = f"{found.largest:.4g} ({found.relative:.3g} standard deviations) over {found.tokens} tokens"
    return {"largest logit difference to base and adapter": words}


def _told(model: MergedModel, count: int, progress: Progress | None) -> Callable[[str], torch.Tensor]:
    done = 0

    def read(name: str) -> torch.Tensor:
        nonlocal done
        if progress is not None:
            progress(name, done, count)
        done += 1
        return model.read(name)

    return read


def _copy_beside(source: Source, work: Path) -> None:
    for name in _BESIDE:
        if (source.base / name).is_file():
            shutil.copyfile(source.base / name, work / name)
    _copy_licences(source, work)


def _copy_licences(source: Source, work: Path) -> None:
    for name in legal_files(source.base):
        shutil.copyfile(source.base / name, work / name)


def _write_card(
    source: Source, work: Path, kind: str, usage: str, measured: Mapping[str, str], *, peft: bool = False
) -> None:
    card = model_card(source.lineage, kind=kind, usage=usage, measured=measured, peft=peft)
    (work / "README.md").write_text(card, encoding="utf-8")


def _exported(
    out: Path, measured: Mapping[str, str] | None = None, warnings: tuple[str, ...] = ()
) -> Exported:
    files = sorted(path for path in out.iterdir() if path.is_file())
    size = sum(path.stat().st_size for path in files)
    return Exported(out, tuple(path.name for path in files), size, measured or {}, warnings)


@contextmanager
def _folder(out: Path, size: float) -> Iterator[Path]:
    """`building`, with room for `size` bytes, and a full disk said in words."""
    parent = next(path for path in out.absolute().parents if path.exists())
    free = shutil.disk_usage(parent).free
    if free < size + _ROOM:
        raise ResourceExhausted(
            f"The export needs {(size + _ROOM) / 1e9:.1f} GB and {parent} has {free / 1e9:.1f} GB free; make room, or "
            "name a folder on another disk."
        )
    try:
        with building(out) as work:
            yield work
    except OSError as error:
        if is_disk_full(error):
            raise ResourceExhausted(f"The disk of {out} is full; what was written is removed.") from error
        raise
