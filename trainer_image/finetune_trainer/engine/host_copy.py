"""A number on its way from the device to the CPU. `loop.py` copies the loss of a step so.

`float(tensor)` would make the CPU wait for the GPU at once. A step has several numbers to read, and one wait is enough
for all of them: all copies are issued first, and the CPU waits once.
"""

from __future__ import annotations

import torch


class HostCopy:
    """A copy of a scalar in the memory of the CPU, which is issued at once and read later."""

    def __init__(self, value: torch.Tensor) -> None:
        """Issue the copy of ``value``, a tensor with one element on any device. The CPU does not wait."""
        # From a GPU torch copies into pinned memory.
        self._value = value.detach().to("cpu", non_blocking=True)
        self._copied: torch.cuda.Event | None = None
        if value.device.type == "cuda":
            self._copied = torch.cuda.Event()
            self._copied.record(torch.cuda.current_stream(value.device))

    def read(self) -> float:
        """Return the number. Wait until the GPU has copied it, which it already has where the CPU has read a later
        result of the GPU since."""
        if self._copied is not None:
            self._copied.synchronize()
        return float(self._value)
