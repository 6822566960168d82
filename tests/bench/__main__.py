"""`make bench`: every measurement of the project, or one of them with ``--only``.

In: nothing. Out: a table per measurement; each compares two things in the same run, because the machine may be busy.

    python -m tests.bench --only fleet
"""

from __future__ import annotations

import argparse
import importlib
import os

BENCHES = {
    "step": "the trainer's optimizer step against a plain PyTorch loop",
    "uploads": "the training thread with checkpoints at 5 MB/s against none",
    "fleet": "the operator with thousands of jobs beside training-operator",
}
"""Module of this package, and what it measures."""


def main() -> None:
    """Run what was chosen."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench",
        description="Measure, side by side in one run: "
        + "; ".join(f"{name}: {what}" for name, what in BENCHES.items()),
        epilog="example: python -m tests.bench --only fleet",
    )
    parser.add_argument("--only", choices=BENCHES, help="one measurement (default: all)")
    chosen = parser.parse_args().only
    for name in [chosen] if chosen else BENCHES:
        print(f"load average {os.getloadavg()[0]:.1f}", flush=True)
        importlib.import_module(f"tests.bench.{name}").run()


if __name__ == "__main__":
    main()
