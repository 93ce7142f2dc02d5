"""What verification costs: on a whole job, and of one dispute. Prints one JSON line last.

    python benchmarks/verification.py [--json] [--part NAME]... [--swarm]

Each part is a module beside this file with `add_options(parser)` and `measure(options) -> Part`. Their figures stand
side by side in the last line; a figure whose part was not asked for is null. --json prints that line alone.
"""

from __future__ import annotations

import argparse
import json
import os
import platform

import torch
import verification_dispute
import verification_overhead
import verification_simulated
import verification_tolerant
from verification_overhead import processor

PARTS = {
    "overhead": verification_overhead, "dispute": verification_dispute, "simulated": verification_simulated,
    "tolerant": verification_tolerant,
}  # fmt: skip
HEADLINE = (
    "overhead_ratio",
    "dispute_seconds",
    "dispute_message_bytes",
    "leaf_opened_bytes",
    "leaf_ms",
    "false_slashes",
    "missed_in_sampled_segments",
)


def main() -> None:
    """Measure the parts asked for, all by default, and print the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="only the last line")
    parser.add_argument("--part", action="append", choices=sorted(PARTS), help="measure this part; may be repeated")
    for module in PARTS.values():
        module.add_options(parser)
    options = parser.parse_args()
    load = os.getloadavg()[0]
    figures: dict[str, object] = dict.fromkeys(HEADLINE)
    details: dict[str, object] = {}
    for name in options.part or PARTS:
        part = PARTS[name].measure(options)
        figures |= part.headline
        details[name] = part.details
        if not options.json:
            print("\n".join(part.lines), flush=True)
    machine = {
        "processor": processor(), "cores": os.cpu_count(), "system": platform.platform(),
        "python": platform.python_version(), "torch": torch.__version__, "load_before": round(load, 2),
    }  # fmt: skip
    print(json.dumps({"benchmark": "verification", "schema": "ichiba.benchmark.verification/1", **figures, **details,
                      "machine": machine}))  # fmt: skip


if __name__ == "__main__":
    main()
