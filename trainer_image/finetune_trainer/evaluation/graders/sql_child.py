"""`python -m finetune_trainer.evaluation.graders.sql_child` judges queries in a process of its own, one after another.

While sqlite executes a single instruction, such as a call of `printf`, it does not check how much time and memory the
instruction takes. So queries run in this process, whose memory and processor time the kernel bounds, and `sql.py`
bounds the time that a request takes. Each request is a line of JSON on the standard input: a list of the answer, the
CREATE TABLE statements and the reference query. The process writes one line with REFERENCE_DONE when it begins with the
answer, and then a line with the grade.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import sys

from finetune_trainer.evaluation.graders.sql import READY, REFERENCE_DONE
from finetune_trainer.evaluation.graders.sql_judge import judge

MEMORY_BYTES = 256 << 20
"""Largest address space of the process in bytes. Python with sqlite needs about 35 MiB."""
PROCESSOR_SECONDS = 3.0
"""Processor time in seconds that a single request may take before the kernel ends the process. An ordinary request
takes a tenth of a second at most."""


def main() -> None:
    """Answer requests until the standard input ends."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _tell(READY)
    for line in sys.stdin:
        # SIGPROF has no handler, so it ends the process even inside of a long instruction.
        signal.setitimer(signal.ITIMER_PROF, PROCESSOR_SECONDS)
        answer, context, query = json.loads(line)
        try:
            grade = judge(answer, context, query, lambda: _tell(REFERENCE_DONE))
        except MemoryError:
            # The parent knows from REFERENCE_DONE whether the reference query or the answer was running. The next
            # request gets a new process.
            os._exit(1)
        signal.setitimer(signal.ITIMER_PROF, 0)
        _tell({"scores": dict(grade.scores), "problem": grade.problem})


def _tell(what: object) -> None:
    sys.stdout.write(json.dumps(what) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError, KeyboardInterrupt):
        main()
