"""Sampling beside transformers' generate (and llama.cpp): batch 8, prompts of 128 tokens, 64 new ones, greedy.

Output tokens a second, the prompts' computation included. Each round has prompts of its own, so no prefix helps.
"""

from __future__ import annotations

import json
import statistics
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from lathe.engine.engine import Engine
from lathe.engine.export.export import export_gguf
from lathe.engine.export.gguf_file import GgufType
from lathe.engine.export.llamacpp import is_installed
from lathe.engine.export.source import Lineage, Source
from lathe.engine.sampling import SamplingParams
from tests.benchmarks.engine import model
from tests.benchmarks.engine.rounds import Setting, Turns, alternate, median_ratio

PROMPT, NEW = 128, 64


def measure(setting: Setting) -> dict[str, float]:
    here = "tests.benchmarks.engine.sampling"
    names = {"ours": f"{here}:ours", "generate": f"{here}:generate"}
    if is_installed():
        names |= {f"llamacpp_{kind}": f"{here}:llamacpp_{kind}" for kind in ("f16", "q8_0")}
    results = alternate(names, setting)
    speeds = {name: one.speed("tokens") for name, one in results.items()}
    beside = {
        f"sampling_vs_{name}": median_ratio(speeds["ours"], speeds[name])
        for name in names
        if name.startswith("llama")
    }
    if "sampling_vs_llamacpp_f16" in beside:
        beside["sampling_vs_llamacpp"] = beside["sampling_vs_llamacpp_f16"]
    return {
        **{f"sampling_{name}_tokens_per_s": statistics.median(values) for name, values in speeds.items()},
        **{f"sampling_{name}_peak_mib": one.peak_mib for name, one in results.items()},
        "sampling_first_step_s": results["ours"].rounds[0].seconds,
        "sampling_vs_hf_generate": median_ratio(speeds["ours"], speeds["generate"]),
        **beside,
    }


def ours(setting: Setting, turns: Turns) -> None:
    engine = model.load_engine(setting)
    number = 0
    while turns.wait():
        number += 1
        turns.report(tokens=sample(engine, [""] * model.BATCH, seed=number))


def sample(engine: Engine, keys: Sequence[str], *, seed: int, new: int = NEW) -> int:
    """All sequences from their prompts to their last token; how many tokens came."""
    params = SamplingParams(max_tokens=new, temperature=0)
    states = [
        engine.open_sequence(key, prompt, params)
        for key, prompt in zip(keys, model.prompts(len(keys), PROMPT, seed), strict=True)
    ]
    while any(state.finished is None for state in states):
        engine.step(states, prefill_tokens=PROMPT * len(states))
    for state in states:
        engine.close_sequence(state)
    return sum(len(state.tokens) for state in states)


def generate(setting: Setting, turns: Turns) -> None:
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(setting.threads)
    base = AutoModelForCausalLM.from_pretrained(setting.folder, dtype=torch.bfloat16).eval()
    number = 0
    while turns.wait():
        number += 1
        turns.report(tokens=hf_generate(base, number))


def hf_generate(base: torch.nn.Module, seed: int, **options: object) -> int:
    """transformers' generate over the same prompts; no end of turn ends it early."""
    ids = torch.tensor(model.prompts(model.BATCH, PROMPT, seed))
    with torch.inference_mode():
        out = base.generate(  # type: ignore[operator]
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=NEW,
            min_new_tokens=NEW,
            do_sample=False,
            pad_token_id=0,
            **options,
        )
    return int(out.shape[0] * (out.shape[1] - PROMPT))


def llamacpp_f16(setting: Setting, turns: Turns) -> None:
    _llamacpp(setting, turns, GgufType.F16)


def llamacpp_q8_0(setting: Setting, turns: Turns) -> None:
    _llamacpp(setting, turns, GgufType.Q8_0)


def _llamacpp(setting: Setting, turns: Turns, kind: GgufType) -> None:
    """llama.cpp's server with a slot for each sequence, asked for all of them at once."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(_gguf(setting, kind))
    params.n_parallel = model.BATCH
    params.n_ctx = model.BATCH * 2 * (PROMPT + NEW)
    params.fit_params = False
    params.ui = False
    params.verbosity = 0
    params.cache_ram_mib = 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = setting.threads
    server = xllamacpp.Server(params)

    def complete(prompt: list[int]) -> int:
        body = {
            "prompt": prompt,
            "n_predict": NEW,
            "temperature": 0.0,
            "ignore_eos": True,
            "return_tokens": True,
        }
        request = urllib.request.Request(
            server.listening_address + "/completion",
            json.dumps(body).encode(),
            {"content-type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=600) as answer:
            return len(json.loads(answer.read())["tokens"])

    number = 0
    with ThreadPoolExecutor(model.BATCH) as pool:
        while turns.wait():
            number += 1
            turns.report(tokens=sum(pool.map(complete, model.prompts(model.BATCH, PROMPT, number))))


def _gguf(setting: Setting, kind: GgufType) -> Path:
    """The same weights as a GGUF file, made the first time."""
    folder = setting.folder.with_name(f"{setting.folder.name}-gguf-{kind}")
    if not folder.is_dir():
        export_gguf(Source(setting.folder, None, Lineage()), folder, kind, verify=False)
    (file,) = folder.glob("*.gguf")
    return file
