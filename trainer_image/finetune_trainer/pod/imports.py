"""Makes the imports of large libraries cheaper. `worker.py` and the preflight check import the modules that need torch
or transformers in the block of `importing`."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def importing() -> Iterator[None]:
    """Inside the block, the garbage collector rests. Imports make objects that stay until the process ends. The
    collector would look again and again at all of them, which takes a quarter of the processor time of importing torch
    and peft."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
