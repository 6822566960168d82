"""`python3 -m finetune_operator`: reads the settings and runs the operator until SIGTERM."""

from __future__ import annotations

import asyncio
import os
import sys

from finetune_operator.application import run
from finetune_operator.logs import configure_logging
from finetune_operator.settings import parse_settings


def main() -> None:
    """Run the operator; a failure ends the process with a code that is not 0."""
    settings = parse_settings(sys.argv[1:], os.environ)
    configure_logging(settings.log_level)
    asyncio.run(run(settings))


if __name__ == "__main__":
    main()
