"""The command of `make gpu-check`: runs the sections of the check, prints their lines, and ends with a verdict.

Standard output has one JSON object a line, and the verdict as a table at the end. Where the variable OUT names a
folder, the same JSON lines go into `gpu-check.jsonl` there. Logs of libraries go to standard error. The exit status is
the number of failures, at most 125. It is 2 with a sentence on standard error where the command line is wrong or where
packages are missing.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from tests.gpu.catalogue import GOALS, SECTIONS, Section
from tests.gpu.packages import advice, missing_packages

LONGEST_SECONDS = 480.0
DRY_SECONDS = 60.0
WRONG_USE = 2
FILE = "gpu-check.jsonl"
EXAMPLES = """examples:
  python -m tests.gpu                                everything, on one GPU, within 8 minutes
  python -m tests.gpu --only machine,join,lora-512   three sections
  python -m tests.gpu --seconds 300                  sections for which no time is left are skipped, and count as failed
  python -m tests.gpu --dry                          a tiny model on the CPU: only shows that the check itself works
  OUT=results python -m tests.gpu                    also writes results/gpu-check.jsonl
"""


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the command line's options: ``only`` (a list of sections), ``seconds`` and ``dry``."""
    names = [section.name for section in SECTIONS]
    listed = "\n".join(f"  {each.name:<14} {each.seconds:>3.0f} s  {each.measures}" for each in SECTIONS)
    parser = argparse.ArgumentParser(
        prog="python -m tests.gpu",
        description=f"Check the trainer on one GPU.\n\nsections, with the time after which each is cut off:\n{listed}",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )

    def sections(text: str) -> list[Section]:
        wanted = text.split(",")
        unknown = [name for name in wanted if name not in names]
        if unknown:
            raise argparse.ArgumentTypeError(f"{unknown[0]!r} is no section; the sections are {', '.join(names)}")
        return [section for section in SECTIONS if section.name in wanted]

    def positive(text: str) -> float:
        with contextlib.suppress(ValueError):
            if 0 < float(text) < float("inf"):
                return float(text)
        raise argparse.ArgumentTypeError(f"must be a number of seconds above 0, and {text!r} is none")

    parser.add_argument(
        "--only", type=sections, default=list(SECTIONS), metavar="SECTION,...", help="only these sections"
    )
    parser.add_argument(
        "--seconds",
        type=positive,
        metavar="N",
        help=f"time for everything (default: {LONGEST_SECONDS:.0f}, with --dry {DRY_SECONDS:.0f})",
    )
    parser.add_argument("--dry", action="store_true", help="run with a tiny model on the CPU")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the check. Raises SystemExit with the exit status."""
    options = parse(arguments)
    missing = missing_packages()
    if missing:
        print(advice(missing), file=sys.stderr)
        sys.exit(WRONG_USE)
    # Python ends without its cleanup at SIGTERM, and would leave the process of the sections behind.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    # These modules import packages that may be missing.
    from tests.gpu.report import Line, to_json
    from tests.gpu.runner import run_sections
    from tests.gpu.verdict import judge

    began = time.monotonic()
    with contextlib.ExitStack() as stack:
        outputs = [sys.stdout]
        if folder := os.environ.get("OUT"):
            Path(folder).mkdir(parents=True, exist_ok=True)
            outputs.append(stack.enter_context((Path(folder) / FILE).open("w", encoding="utf-8")))

        def write(text: str) -> None:
            for output in outputs:
                print(text, file=output, flush=True)

        def write_line(line: Line) -> None:
            write(to_json(line, time.monotonic() - began))

        seconds = options.seconds or (DRY_SECONDS if options.dry else LONGEST_SECONDS)
        lines = run_sections(options.only, dry=options.dry, seconds=seconds, write=write_line)
        verdict = judge(lines, GOALS, dry=options.dry)
        write(json.dumps({"at": round(time.monotonic() - began, 1), "kind": "verdict", **verdict.as_values()}))
    print(f"\n{verdict.as_table()}", flush=True)
    sys.exit(verdict.exit_status)


if __name__ == "__main__":
    main()
