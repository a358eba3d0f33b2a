"""GGUF files run by llama.cpp itself (the wheel xllamacpp), through its server on a loopback port."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from lathe.common.errors import FailedPrecondition

_F32 = 0  # ggml_type of the cache: what is measured is the file, not a rounded cache
_TIMEOUT_S = 600.0


def is_installed() -> bool:
    """Whether exports can be checked with llama.cpp here."""
    try:
        import xllamacpp  # noqa: F401
    except ImportError:
        return False
    return True


class LlamaCpp:
    """One loaded file. Raises FailedPrecondition with llama.cpp's refusal where it cannot load it."""

    def __init__(self, file: Path, *, context: int, threads: int) -> None:
        """context: tokens of the longest row that will be asked."""
        import xllamacpp

        params = xllamacpp.CommonParams()
        params.model.path = str(file)
        params.n_ctx = context
        params.n_parallel = 1
        params.warmup = False
        params.fit_params = False
        params.ui = False
        params.verbosity = 0
        params.cache_ram_mib = 0
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type(_F32)
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
        try:
            self._server = xllamacpp.Server(params)
        except RuntimeError as error:
            raise FailedPrecondition(f"llama.cpp does not load {file.name}: {error}.") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # It ends with its object; nothing else says so.
        del self._server

    def tokens(self, text: str) -> list[int]:
        """Ids of a rendered text, as `Tokenizer.encode` gives them."""
        body = {"content": text, "add_special": False, "parse_special": True}
        return [int(id_) for id_ in self._post("/tokenize", body)["tokens"]]

    def render(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """The chat template on these messages, up to where the answer begins."""
        return str(
            self._post("/apply-template", {"messages": [dict(message) for message in messages]})["prompt"]
        )

    def greedy(self, prompt: Sequence[int], count: int) -> list[int]:
        """The most likely next tokens; fewer than `count` where the last one ends the answer."""
        answer = self._complete(prompt, n_predict=count, return_tokens=True)
        return [int(id_) for id_ in answer["tokens"]]

    def logprobs(self, prompt: Sequence[int], vocab: int, whole: int) -> Tensor:
        """log p [vocab] of the token after a prompt, float64.

        whole: a token that is text by itself. It is made the answer, since one that ends a turn or is a part of a
        character comes without its numbers; what is answered are the logits before any such bias.
        """
        answer = self._complete(prompt, n_predict=1, n_probs=vocab, logit_bias=[[whole, 1e6]])
        found = torch.full((vocab,), -torch.inf, dtype=torch.float64)
        for entry in answer["completion_probabilities"][0]["top_logprobs"]:
            found[int(entry["id"])] = float(entry["logprob"])
        return found

    def _complete(self, prompt: Sequence[int], **options: object) -> dict[str, Any]:
        body = {
            "prompt": list(prompt),
            "temperature": 0.0,
            "samplers": ["top_k"],
            "top_k": 1,
            "cache_prompt": True,
        }
        return self._post("/completion", {**body, **options})

    def _post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        return post(self._server.listening_address, path, body)


def post(address: str, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
    """What a llama.cpp server on this machine answers: no proxy of the environment's is asked.

    Raises FailedPrecondition where it refuses or does not answer.
    """
    request = urllib.request.Request(
        address + path, json.dumps(body).encode(), {"content-type": "application/json"}
    )
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=_TIMEOUT_S) as answer:
            return dict(json.loads(answer.read()))
    except urllib.error.HTTPError as error:
        raise FailedPrecondition(
            f"llama.cpp refuses {path}: {error.read().decode(errors='replace')}"
        ) from error
    except OSError as error:
        raise FailedPrecondition(f"llama.cpp does not answer {path}: {error}.") from error
