"""The command of `make bench`, which runs all measurements of the project, or only the measurement that ``--only``
names.

The measurements print tables or lines. Most measurements compare this project with another program, or compare two
settings of this project. The two sides of a comparison run close together in time, because other work on the machine
changes absolute times.

    python -m tests.bench --only fleet
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys

BENCHES = {
    "step": "the trainer's optimizer step against a plain PyTorch loop",
    "engines": "a step of the plain engine and of DeepSpeed against a plain PyTorch loop, in CPU seconds",
    "peers": "the trainer against Hugging Face's Trainer and trl on the same rows",
    "rows": "examples of many rows at once and in several processes against one row at a time",
    "uploads": "the training thread with checkpoints at 5 MB/s against none",
    "reports": "the memory of the report server with many connections against few",
    "reporting": "the operator with a thousand jobs that report against its limits",
    "fleet": "the operator with thousands of jobs beside training-operator",
    "compare": "the page of finetune compare with many long runs against a page of two short ones",
    "checks": "attempt 1 after the preflight check, alone and beside a thousand jobs",
}
"""What each measurement compares, by the name of its module in this package."""


def main() -> None:
    """Run the measurements that the command line selects."""
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
        # Each measurement runs in a process of its own, so that it inherits no memory, threads or settings from the
        # measurement before.
        subprocess.run([sys.executable, "-m", f"tests.bench.{name}"], check=True)


if __name__ == "__main__":
    main()
