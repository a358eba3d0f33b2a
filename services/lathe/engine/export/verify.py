"""Whether llama.cpp computes from a GGUF file what Lathe does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lathe.common.errors import FailedPrecondition
from lathe.engine.export.llamacpp import LlamaCpp
from lathe.engine.export.reference import Reference
from lathe.engine.export.texts import PROMPTS, ROW_TOKENS, Probe
from lathe.text.tokenizer import Tokenizer

GREEDY_TOKENS = 32
DIVERGENCE_TOKENS = 8
MEAN_KL = 0.02
# Two logits closer than this may change places when activations are rounded to f16, as llama.cpp does.
TIE = 0.05


@dataclass(frozen=True, slots=True)
class GgufCheck:
    """greedy_tokens: compared, of `prompts` answers; ties: where llama.cpp took the other of two logits less than TIE
    apart; mean_kl: of q8_0 to f16 over `positions`, None for f16; template_same: chats are rendered alike."""

    prompts: int
    greedy_tokens: int
    ties: int
    template_same: bool
    mean_kl: float | None = None
    positions: int = 0


def check_gguf(
    f16: Path,
    ours: Reference,
    tokenizer: Tokenizer,
    probes: Sequence[Probe],
    *,
    q8_0: Path | None,
    context: int,
    threads: int,
) -> GgufCheck:
    """Runs the files. context: what the file says that it has, which prompts must fit into.

    Raises FailedPrecondition (reason EXPORT_DIFFERS) with what differs, and where.
    """
    longest = min(ROW_TOKENS, context - GREEDY_TOKENS)
    if longest < 1:
        raise FailedPrecondition(f"A context of {context} tokens is too short to be checked.")
    chosen = [
        (probe, ids) for probe in probes[:PROMPTS] if (ids := tokenizer.encode(probe.prompt)[-longest:])
    ]
    context = max(len(ids) for _, ids in chosen) + GREEDY_TOKENS
    compared = ties = 0
    alike = True
    answers: list[tuple[list[int], list[int]]] = []
    with LlamaCpp(f16, context=context, threads=threads) as model:
        for probe, ids in chosen:
            _check_tokens(model, tokenizer, probe)
            alike = alike and (not probe.messages or model.render(probe.messages) == probe.prompt)
            answer = model.greedy(ids, GREEDY_TOKENS)
            ties += compare_greedy(ours.logits([*ids, *answer])[len(ids) - 1 :], answer)
            compared += len(answer)
            answers.append((ids, answer))
        if q8_0 is None:
            return GgufCheck(len(chosen), compared, ties, alike)
        with LlamaCpp(q8_0, context=context, threads=threads) as rounded:
            found = _divergences(model, rounded, tokenizer, answers, ours.vocab_size)
    mean = sum(found) / len(found)
    if not mean <= MEAN_KL:
        raise _differs(
            f"q8_0 is too far from f16: a mean KL of {mean:.4f}, more than {MEAN_KL}. Export f16 instead."
        )
    return GgufCheck(len(chosen), compared, ties, alike, mean, len(found))


def compare_greedy(logits: Tensor, answer: Sequence[int]) -> int:
    """How many of llama.cpp's greedy tokens are ties in ours.

    logits [at least n, vocab]: ours before each of the n tokens. As each is compared after the same tokens, none of
    them differing means that our own greedy answer is this one. Raises FailedPrecondition at the first that is
    another and no tie.
    """
    ties = 0
    for position, token in enumerate(answer):
        row = logits[position]
        best = int(row.argmax())
        gap = float(row[best] - row[token])
        if not gap < TIE:
            raise _differs(
                f"llama.cpp does not answer as the model does: at greedy token {position + 1} it takes {token} where "
                f"ours takes {best}, {gap:.3f} above it."
            )
        ties += best != token
    return ties


def _check_tokens(model: LlamaCpp, tokenizer: Tokenizer, probe: Probe) -> None:
    expected, found = tokenizer.encode(probe.row), model.tokens(probe.row)
    if expected != found:
        pairs = enumerate(zip(expected, found, strict=False))
        place = next((i for i, (a, b) in pairs if a != b), min(len(expected), len(found)))
        raise _differs(
            f"llama.cpp cuts the text {probe.row[:60]!r} into other tokens from token {place + 1} on: "
            f"{found[place : place + 3]} where the tokenizer gives {expected[place : place + 3]}."
        )


def _divergences(
    model: LlamaCpp,
    rounded: LlamaCpp,
    tokenizer: Tokenizer,
    answers: Sequence[tuple[list[int], list[int]]],
    vocab: int,
) -> list[float]:
    """KL(f16 || q8_0) in nats over the whole vocabulary, before the first tokens of each answer."""
    whole = tokenizer.encode("a")[-1]
    found = []
    for ids, answer in answers:
        for count in range(min(DIVERGENCE_TOKENS, len(answer))):
            prompt = [*ids, *answer[:count]]
            p, q = model.logprobs(prompt, vocab, whole), rounded.logprobs(prompt, vocab, whole)
            found.append(float(torch.where(p.isfinite(), p.exp() * (p - q), 0.0).sum()))
    return found


def _differs(message: str) -> FailedPrecondition:
    return FailedPrecondition(message, reason="EXPORT_DIFFERS")
