"""`python3 -m finetune_operator`: reads the settings and runs the operator until SIGTERM."""

from __future__ import annotations

import asyncio
import gc
import os
import sys

from finetune_operator.application import run
from finetune_operator.process.logs import configure_logging
from finetune_operator.process.settings import parse_settings


def main() -> None:
    """Run the operator; a failure ends the process with a code that is not 0."""
    settings = parse_settings(sys.argv[1:], os.environ)
    configure_logging(settings.log_level)
    _spare_the_collector()
    asyncio.run(run(settings))


def _spare_the_collector() -> None:
    """Take what was imported, which lives as long as the process, out of the garbage collector's view.

    A full collection stops the event loop while it looks at every object that it knows, and most are modules.
    """
    gc.collect()
    gc.freeze()


if __name__ == "__main__":
    main()
