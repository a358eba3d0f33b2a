"""What the command line calls the fields of requests: an error names the option that was given, not gRPC's path."""

from __future__ import annotations

from lathe.client.jobsettings import METHODS, setting_paths
from lathe.common.fieldwords import Renames, renamed_text

_OPTIONS = (
    ("dataset.display_name", "The file's name"),
    ("dataset.purpose", "--purpose"),
    ("dataset.import_options.file_type", "--file-type"),
    ("dataset.import_options.columns", "--column"),
    ("dataset.import_options", "--file-type (or --column)"),
    ("job.training_dataset", "--train"),
    ("job.validation_dataset", "--validation"),
    ("job.compute.engine_class", "--engine-class"),
    ("job.compute.dedicated", "--dedicated"),
    ("job.compute.workers", "--workers"),
    *((f"job.{name}", f"--{name}") for name in ("model", "suffix", "seed")),
    *((f"job.method.{name}", f"--method {name}") for name in METHODS),
    ("job.method", "--method"),
    ("replaces.prompt_tokens_saved", "--prompt-tokens-saved"),
    ("replaces.price_per_million_tokens", "--price-per-million"),
    ("replaces.seconds_saved", "--seconds-saved"),
    ("replaces.requests_per_hour", "--requests-per-hour"),
    ("options.context_limit", "--context-limit"),
    ("options.method", "--method"),
    ("options.truncation", "--truncation"),
    ("operation.split.seed", "--seed"),
    ("operation.split.stratify_by", "--by"),
    ("operation.split", "split"),
    ("operation.sample.count", "--count"),
    ("operation.sample.seed", "--seed"),
    ("operation.dedupe.base_model", "--near"),
    ("operation.drop.lines", "--lines"),
    ("operation.drop.codes", "--finding"),
    ("operation.drop.base_model", "--model"),
    ("operation.truncate.base_model", "--model"),
    ("operation.truncate.policy", "--policy"),
    ("operation.truncate.keep_unfit", "--keep-unfit"),
    *((f"operation.{name}", name) for name in ("dedupe", "drop", "sample", "truncate")),
)


def option_names() -> Renames:
    """For `renamed`. A job's settings are called as `--set` takes them."""
    settings = {path: name for method in METHODS for name, path in setting_paths(method).items()}
    return (*settings.items(), *_OPTIONS)


def in_options(text: str) -> str:
    """A text from the platform with its fields called as options are."""
    return renamed_text(text, option_names())
