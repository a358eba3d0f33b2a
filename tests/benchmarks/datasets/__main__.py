"""What the dataset service does, beside its references: python -m tests.benchmarks.datasets [--only validate] …

One measure is one module here, each with `measure(setting) -> figures`, and each runs alone. Every ratio is of
contenders that took turns. The last line is one JSON object; figures that this machine cannot give are absent.
"""

from __future__ import annotations

import argparse
import importlib
import json
import time
from pathlib import Path

from tests.benchmarks.datasets.corpus import ROOT, Setting

MEASURES = ("validate", "memory", "audit", "upload")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default=",".join(MEASURES), help=f"of {', '.join(MEASURES)}")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of each contender")
    parser.add_argument("--megabytes", type=int, default=64, help="size of the file that is read for a rate")
    parser.add_argument("--data", type=Path, default=ROOT / "build" / "bench", help="where files are kept")
    options = parser.parse_args()
    chosen = options.only.split(",")
    unknown = [name for name in chosen if name not in MEASURES]
    if unknown:
        parser.error(f"{unknown[0]!r} is no measure; there are {', '.join(MEASURES)}")
    setting = Setting(options.data, options.rounds, options.megabytes)
    figures: dict[str, float] = {"rounds": options.rounds}
    for name in chosen:
        print(f"— {name}", flush=True)
        began = time.monotonic()
        measured = importlib.import_module(f"tests.benchmarks.datasets.{name}").measure(setting)
        for key, value in measured.items():
            print(f"{key:36} {value:.4g}", flush=True)
        print(f"took {time.monotonic() - began:.0f} s", flush=True)
        figures.update(measured)
    print(json.dumps({key: round(value, 4) for key, value in figures.items()}))


if __name__ == "__main__":
    main()
