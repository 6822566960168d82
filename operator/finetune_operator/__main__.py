"""The command `python3 -m finetune_operator`: parses arguments and environment, then runs the operator until SIGTERM.

The operator's image starts this command (operator/Dockerfile). `application.py` does the work.
"""

from __future__ import annotations

import asyncio
import gc
import os
import sys

from finetune_operator.application import run
from finetune_operator.process.logs import configure_logging
from finetune_operator.process.settings import parse_settings


def main() -> None:
    """Run the operator until SIGTERM. An exception ends the process with an exit code other than 0."""
    settings = parse_settings(sys.argv[1:], os.environ)
    configure_logging(settings.log_level)
    _exempt_imports_from_collection()
    asyncio.run(run(settings))


def _exempt_imports_from_collection() -> None:
    """Exempt every object that exists now from Python's garbage collection.

    Most of these objects belong to imported modules and live until the end of the process. A full collection would
    visit all of them, and the event loop would stand still meanwhile.
    """
    gc.collect()
    gc.freeze()


if __name__ == "__main__":
    main()
