"""Memory of the host for snapshots of the training state: buffers that are allocated once and used again.

`StateBuffers` holds at most as many snapshots as it has buffers, so that checkpoints take a bounded amount of memory.
`StagingRing` copies tensors from the device to the host through a few small buffers. On a GPU these are pinned, because
the GPU copies to pinned memory several times faster, and without the CPU. Only the small buffers are pinned: the kernel
can't move or drop pinned pages, and torch rounds the size of a pinned buffer up to a power of two.
`fragment_snapshot.py` uses both classes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

ELEMENT_BYTES = 4
"""Size of an fp32 value in bytes."""


class StateBuffer:
    """A buffer that holds one snapshot until `release`."""

    def __init__(self, values: torch.Tensor, release: Callable[[torch.Tensor], None]) -> None:
        self.values = values
        """fp32, one dimension."""
        self._release: Callable[[torch.Tensor], None] | None = release

    def release(self) -> None:
        """Let a later snapshot use the memory. Nobody may read the tensors of this snapshot afterwards. A second call
        does nothing."""
        if self._release is not None:
            release, self._release = self._release, None
            release(self.values)


class StateBuffers:
    """A fixed number of buffers of the same size. A buffer is allocated when it is used for the first time."""

    def __init__(self, elements: int, *, count: int) -> None:
        """Each of at most ``count`` buffers has ``elements`` fp32 values."""
        self._elements = elements
        self._count = count
        self._allocated = 0
        self._idle: list[torch.Tensor] = []

    @property
    def allocated_bytes(self) -> int:
        """Size of all buffers that were allocated so far, in bytes."""
        return self._allocated * self._elements * ELEMENT_BYTES

    @property
    def free(self) -> int:
        """How many more snapshots can be held at this moment."""
        return len(self._idle) + self._count - self._allocated

    def acquire(self) -> StateBuffer:
        """Return a buffer for one snapshot. Raises RuntimeError where all buffers are in use, so the caller looks at
        `free` first. Call this from one thread only. Any thread may release a buffer."""
        # A released buffer is appended by one call, which is atomic, so no lock is needed.
        if self._idle:
            return StateBuffer(self._idle.pop(), self._idle.append)
        if self._allocated == self._count:
            raise RuntimeError(f"all {self._count} buffers for snapshots are in use")
        self._allocated += 1
        return StateBuffer(torch.empty(self._elements, dtype=torch.float32), self._idle.append)


class _Piece:
    """One buffer of a `StagingRing`, and where its content belongs."""

    def __init__(self, elements: int, *, pinned: bool) -> None:
        self.values = torch.empty(elements, dtype=torch.float32, pin_memory=pinned)
        self.used = 0
        self.destinations: list[torch.Tensor] = []
        self.copied: torch.cuda.Event | None = None

    def deliver(self) -> None:
        """Wait until the device has filled this buffer, copy its content to where it belongs, and empty it."""
        if self.copied is not None:
            self.copied.synchronize()
        begin = 0
        for destination in self.destinations:
            destination.copy_(self.values[begin : begin + destination.numel()])
            begin += destination.numel()
        self.used, self.destinations, self.copied = 0, [], None


class StagingRing:
    """Copies tensors to the host. While the device fills one buffer, the host empties the buffer before."""

    def __init__(self, elements: int, *, device: torch.device, pieces: int = 2) -> None:
        """Allocate ``pieces`` buffers of ``elements`` fp32 values each. They are pinned where ``device`` is a GPU."""
        pinned = device.type == "cuda"
        self._pieces = [_Piece(elements, pinned=pinned) for _ in range(pieces)]
        self._current = 0
        self._stream = torch.cuda.Stream(device) if pinned else None

    @property
    def allocated_bytes(self) -> int:
        """Size of all buffers in bytes."""
        return sum(piece.values.nbytes for piece in self._pieces)

    def copy(self, source: torch.Tensor, destination: torch.Tensor) -> None:
        """Copy ``source`` to ``destination``, fp32 tensors of one dimension and of the same length. The destination is
        in the memory of the host. It has its values after `flush`, and the source must not change before."""
        begin = 0
        while begin < source.numel():
            piece = self._pieces[self._current]
            room = piece.values.numel() - piece.used
            if room == 0:
                self._next_piece()
                continue
            end = min(begin + room, source.numel())
            self._stage(piece, source[begin:end])
            piece.destinations.append(destination[begin:end])
            begin = end

    def flush(self) -> None:
        """Return when all copies have arrived."""
        for _ in self._pieces:
            self._next_piece()

    def _stage(self, piece: _Piece, values: torch.Tensor) -> None:
        target = piece.values[piece.used : piece.used + values.numel()]
        piece.used += values.numel()
        if self._stream is None:
            target.copy_(values)
            return
        # The values may still be computed, so the stream of the copies waits for the stream of the computation.
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        with torch.cuda.stream(self._stream):
            target.copy_(values, non_blocking=True)
            piece.copied = self._stream.record_event()
        if values.is_cuda:
            # The values may be a temporary tensor, whose memory must not be used again before the copy is made.
            values.record_stream(self._stream)

    def _next_piece(self) -> None:
        """Turn to the next buffer, which is the one that was filled first."""
        self._current = (self._current + 1) % len(self._pieces)
        self._pieces[self._current].deliver()
