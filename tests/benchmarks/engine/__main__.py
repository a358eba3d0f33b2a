"""The engine's speed beside its references: python -m tests.benchmarks.engine [--only sft,sampling] …

One measure is one module here, and each runs alone. Every ratio is of contenders that took turns in one run (see
rounds.py). The last line is one JSON object; figures that this machine cannot give are absent.
"""

from __future__ import annotations

import argparse
import importlib
import json
from pathlib import Path

from tests.benchmarks.engine.model import ROOT, base_folder
from tests.benchmarks.engine.rounds import Setting

MEASURES = ("sft", "fused", "sampling", "adapters", "interleave", "warm_start")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default=",".join(MEASURES), help=f"of {', '.join(MEASURES)}")
    parser.add_argument("--rounds", type=int, default=5, help="warm rounds of each contender")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--data", type=Path, default=ROOT / "build" / "bench", help="where the model is kept")
    options = parser.parse_args()
    chosen = options.only.split(",")
    unknown = [name for name in chosen if name not in MEASURES]
    if unknown:
        parser.error(f"{unknown[0]!r} is no measure; there are {', '.join(MEASURES)}")
    setting = Setting(base_folder(options.data), options.threads, options.rounds)
    figures: dict[str, float] = {"threads": options.threads, "rounds": options.rounds}
    for name in chosen:
        print(f"— {name}", flush=True)
        measured = importlib.import_module(f"tests.benchmarks.engine.{name}").measure(setting)
        for key, value in measured.items():
            print(f"{key:36} {value:.4g}", flush=True)
        figures.update(measured)
    print(json.dumps({key: round(value, 4) for key, value in figures.items()}))


if __name__ == "__main__":
    main()
