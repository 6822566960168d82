"""`make bench`: every measurement of the project, or one of them with ``--only``.

In: nothing. Out: a table per measurement; each compares two things in the same run, because the machine may be busy.

    python -m tests.bench --only fleet
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys

BENCHES = {
    "step": "the trainer's optimizer step against a plain PyTorch loop",
    "peers": "the trainer against Hugging Face's Trainer and trl on the same rows",
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
        print(f"{name}, load average {os.getloadavg()[0]:.1f}", flush=True)
        # Each in a process of its own: none inherits another's memory, threads or settings.
        subprocess.run([sys.executable, "-m", f"tests.bench.{name}"], check=True)


if __name__ == "__main__":
    main()
