"""The process that runs sections: `python -m tests.gpu.section_process FILE_DESCRIPTOR PARENT_PID [--dry]`.

`runner.py` starts the process, and writes an order for each section to its standard input: a JSON object with the
section's name, module, function and bound in seconds. The process answers through the file descriptor, first with a
line `READY` when the section's module is imported, then with the section's lines (report.py). The last line of a
section is a `SectionEnd`.

Sections run in a process of their own, because nothing but the end of its process ends a call of CUDA that hangs, and
because after some errors of CUDA a process can't use the GPU any more.
"""

from __future__ import annotations

import faulthandler
import gc
import importlib
import json
import os
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any, TextIO

from finetune_trainer.pod.imports import importing
from finetune_trainer.pod.signals import end_with_parent
from finetune_trainer.pod.unused_libraries import leave_out_bitsandbytes
from finetune_trainer.ranks.process import prepare_environment
from tests.gpu.report import READY, Check, End, Line, SectionEnd, to_json
from tests.gpu.settings import SHORT, rank_environment, run_config

TRACE_CHARACTERS = 2000
GIB = 2**30


def main() -> None:
    """Run the sections that are ordered, until standard input ends."""
    channel = os.fdopen(int(sys.argv[1]), "w", buffering=1)
    dry = "--dry" in sys.argv[3:]
    end_with_parent(int(sys.argv[2]))
    # The same preparation as that of a worker of the trainer. It must come before the first import of torch.
    prepare_environment(Path(tempfile.mkdtemp()))
    leave_out_bitsandbytes(run_config(SHORT, dry=dry))
    os.environ.update(rank_environment(dry=dry))
    began = time.monotonic()
    for order in sys.stdin:
        _run(json.loads(order), channel, dry=dry, began=began)
    # The threads of NCCL and gloo may hang in the cleanup of a normal exit.
    channel.flush()
    sys.stderr.flush()
    os._exit(0)


def _run(order: dict[str, Any], channel: TextIO, *, dry: bool, began: float) -> None:
    """Run one section, and write its lines. Whatever the section raises becomes its `SectionEnd`."""
    name, started = str(order["name"]), time.monotonic()
    imported = started

    def write(line: Line) -> None:
        channel.write(to_json(line, time.monotonic() - began) + "\n")

    how, problem, trace = End.DONE, "", ""
    try:
        with importing():
            module = importlib.import_module(order["module"])
        # The collector leaves out what was imported. Otherwise each collection after a section would take seconds.
        gc.freeze()
        imported = time.monotonic()
        channel.write(READY + "\n")
        # Shortly before the section is cut off, the stacks of all threads go to standard error.
        faulthandler.dump_traceback_later(order["seconds"])
        getattr(module, order["function"])(Check(name, dry, write))
    except BaseException as error:  # noqa: BLE001  (one failure costs one line)
        how, problem = End.RAISED, f"{type(error).__name__}: {str(error)[:500]}"
        trace = traceback.format_exc()[-TRACE_CHARACTERS:]
    finally:
        faulthandler.cancel_dump_traceback_later()
    seconds = round(time.monotonic() - imported, 1)
    write(SectionEnd(name, how, seconds, round(imported - started, 1), problem, trace, _left_gib()))


def _left_gib() -> float:
    """Free what the section does not use any more, and return the GPU memory in GiB that is still in use."""
    torch = sys.modules.get("torch")
    if torch is None:
        return 0.0
    gc.collect()
    if not torch.cuda.is_initialized():
        return 0.0
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return round(float(torch.cuda.memory_allocated()) / GIB, 2)


if __name__ == "__main__":
    main()
