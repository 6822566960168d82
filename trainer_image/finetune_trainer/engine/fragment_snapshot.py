"""Takes snapshots of the training state from the fragments that the ranks hold.

A snapshot has the same tensors as one of `state.take_snapshot`: each parameter whole, at one rank. But `take_snapshot`
reduces or gathers three tensors for each parameter, and so sends every value to every rank. Here each rank reads its
own fragments, and sends them only to the rank that stores the parameter, in rounds of a fixed size. So the number of
collectives follows from the bytes and not from the number of parameters, and a single process needs none.

`checkpoints/saver.py` takes its snapshots here.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple, Protocol

import torch
import torch.distributed as dist

from finetune_trainer.engine.fragments import Fragment
from finetune_trainer.engine.host_buffers import ELEMENT_BYTES, StagingRing, StateBuffer, StateBuffers
from finetune_trainer.engine.state import STATE_KINDS, assign_owners

STATE_BYTES = len(STATE_KINDS) * ELEMENT_BYTES
"""Bytes of a snapshot for each trained parameter, over all ranks."""
ALIVE = 3
"""How many snapshots a rank holds at once at most: one that is uploaded, the best one, which waits and is never dropped
(`checkpoints/uploads.py`), and one that is being taken. The plan counts as many (`planning/host_needs.py`)."""
PIECE_BYTES = 64 << 20
"""Size of each of the two staging buffers of the host, and of each of the two buffers of the device through which the
ranks exchange fragments, in bytes."""
Extents = Mapping[str, tuple[int, int]]
"""The fragment that a rank holds of each parameter: its first element and its number of elements."""


class HoldsFragments(Protocol):
    """What a snapshot needs of an engine."""

    @property
    def device(self) -> torch.device:
        """The device that the engine computes on."""

    @property
    def parameter_shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Whole shapes of the trained parameters by name, in the model's order."""

    def read_fragment(self, name: str, kind: str) -> Fragment:
        """Return the part that this rank holds of a trained parameter, or of one of its moments."""


class Part(NamedTuple):
    """A whole fragment on its way from the rank that holds it to the rank that stores its parameter."""

    name: str
    kind: str
    length: int
    destination: int
    """Place of the first element in the buffer of the rank that stores the parameter."""


class SnapshotPlan:
    """Which fragments each rank sends to which rank. All ranks compute the same plan."""

    def __init__(self, shapes: Mapping[str, Sequence[int]], fragments: Sequence[Extents]) -> None:
        """``shapes`` are the whole shapes of the parameters in the model's order, and ``fragments`` has what each rank
        holds. Together the ranks hold every element, once or, at stage 0, all of them at every rank."""
        ranks = range(len(fragments))
        self._shapes = shapes
        self._owners = assign_owners(shapes, len(fragments))
        self._parts: dict[tuple[int, int], list[Part]] = {pair: [] for pair in itertools.product(ranks, ranks)}
        self._offsets: dict[str, int] = {}
        sizes = [0 for _ in ranks]
        for name, owner in self._owners_in_order():
            elements = math.prod(shapes[name])
            whole = fragments[owner][name] == (0, elements)
            for kind in STATE_KINDS:
                self._offsets[f"{name}/{kind}"] = sizes[owner]
                for source in [owner] if whole else ranks:
                    start, length = fragments[source][name]
                    if length:
                        self._parts[source, owner].append(Part(name, kind, length, sizes[owner] + start))
                sizes[owner] += elements
        self._sizes = sizes
        self._elements = {pair: sum(part.length for part in parts) for pair, parts in self._parts.items()}

    def _owners_in_order(self) -> Iterator[tuple[str, int]]:
        return ((name, self._owners[name]) for name in self._shapes)

    def parts(self, source: int, owner: int) -> Sequence[Part]:
        """Return what the rank ``source`` sends to the rank ``owner``, or keeps where both are the same, in order."""
        return self._parts[source, owner]

    def elements(self, source: int, owner: int) -> int:
        """Return how many values the parts between the two ranks have together."""
        return self._elements[source, owner]

    def stored_elements(self, rank: int) -> int:
        """Return how many values ``rank`` stores."""
        return self._sizes[rank]

    def rounds(self, elements: int) -> int:
        """Return in how many rounds the ranks exchange their parts, if each rank sends at most ``elements`` values to
        another rank in a round."""
        largest = max((count for (source, owner), count in self._elements.items() if source != owner), default=0)
        return -(-largest // elements)

    def tensors(self, values: torch.Tensor, rank: int) -> dict[str, torch.Tensor]:
        """Return the tensors in the buffer of ``rank`` by `<parameter>/<kind>`, as views with their whole shapes."""
        found = {}
        for name, owner in self._owners_in_order():
            if owner == rank:
                for kind in STATE_KINDS:
                    begin = self._offsets[f"{name}/{kind}"]
                    end = begin + math.prod(self._shapes[name])
                    found[f"{name}/{kind}"] = values[begin:end].view(tuple(self._shapes[name]))
        return found


class _Cursor:
    """A position in the values of several parts that follow each other."""

    def __init__(self, parts: Sequence[Part]) -> None:
        self._parts = parts
        self._index = self._offset = 0

    def take(self, elements: int) -> Iterator[tuple[Part, int, int]]:
        """Yield (part, first value, number of values) for the next ``elements`` values, or for as many as are left."""
        while elements and self._index < len(self._parts):
            part = self._parts[self._index]
            length = min(elements, part.length - self._offset)
            yield part, self._offset, length
            elements -= length
            self._offset += length
            if self._offset == part.length:
                self._index, self._offset = self._index + 1, 0


class HeldSnapshot(NamedTuple):
    """A snapshot in memory of the host."""

    tensors: Mapping[str, torch.Tensor]
    """fp32 tensors by `<parameter>/<kind>`, as `state.take_snapshot` returns them."""
    buffer: StateBuffer
    """The memory of the tensors. Release it when the files are written."""


class FragmentSnapshots:
    """Takes the snapshots of one engine into memory that is used again. One rank has one object for each engine."""

    def __init__(
        self,
        engine: HoldsFragments,
        *,
        rank: int,
        world_size: int,
        alive: int = ALIVE,
        piece_bytes: int = PIECE_BYTES,
        note_progress: Callable[[], None] = lambda: None,
    ) -> None:
        """Tell the other ranks which fragments this rank holds. All ranks must make their object together. ``alive`` is
        the largest number of snapshots at once. `take` calls ``note_progress`` after each part of a copy, so that a
        large snapshot is not taken for a call that never returns."""
        self._engine = engine
        self._note_progress = note_progress
        self._rank = rank
        self._world_size = world_size
        self._plan = SnapshotPlan(engine.parameter_shapes, self._exchanged_extents())
        elements = piece_bytes // ELEMENT_BYTES
        self._round_elements = max(1, elements // world_size)
        self._buffers = StateBuffers(self._plan.stored_elements(rank), count=alive)
        self._ring = StagingRing(elements, device=engine.device)

    @property
    def free(self) -> int:
        """How many more snapshots this rank can hold at this moment. The number may differ between ranks."""
        return self._buffers.free

    @property
    def bytes_of_one(self) -> int:
        """Memory of one snapshot on this rank, in bytes."""
        return self._plan.stored_elements(self._rank) * ELEMENT_BYTES

    @property
    def allocated_bytes(self) -> int:
        """The memory of the host that all snapshots have taken so far, in bytes. It is never given back."""
        return self._buffers.allocated_bytes + self._ring.allocated_bytes

    @property
    def rounds(self) -> int:
        """How many collectives `take` needs."""
        return self._plan.rounds(self._round_elements)

    def take(self) -> HeldSnapshot:
        """Copy the part of the training state that this rank stores into memory of the host. All ranks must call this
        function together. Raises RuntimeError where no memory is free on this rank, so the ranks agree on `free`
        first."""
        buffer = self._buffers.acquire()
        try:
            with torch.no_grad():
                for part in self._plan.parts(self._rank, self._rank):
                    values = self._engine.read_fragment(part.name, part.kind).values
                    self._ring.copy(values, buffer.values[part.destination : part.destination + part.length])
                    self._note_progress()
                self._ring.flush()
                if rounds := self.rounds:
                    self._exchange(buffer.values, rounds)
        except BaseException:
            buffer.release()
            raise
        return HeldSnapshot(self._plan.tensors(buffer.values, self._rank), buffer)

    def _exchange(self, stored: torch.Tensor, rounds: int) -> None:
        """Send this rank's parts to the ranks that store them, and copy what the other ranks send into ``stored``."""
        others = [rank for rank in range(self._world_size) if rank != self._rank]
        sending = {rank: _Cursor(self._plan.parts(self._rank, rank)) for rank in others}
        receiving = {rank: _Cursor(self._plan.parts(rank, self._rank)) for rank in others}
        room = self._round_elements * self._world_size
        outgoing, incoming = (torch.empty(room, dtype=torch.float32, device=self._engine.device) for _ in range(2))
        for number in range(rounds):
            sent = [self._round_size(number, self._rank, rank) for rank in range(self._world_size)]
            received = [self._round_size(number, rank, self._rank) for rank in range(self._world_size)]
            begin = 0
            for rank in others:
                for part, offset, length in sending[rank].take(self._round_elements):
                    values = self._engine.read_fragment(part.name, part.kind).values[offset : offset + length]
                    outgoing[begin : begin + length].copy_(values)
                    begin += length
            dist.all_to_all_single(incoming[: sum(received)], outgoing[: sum(sent)], received, sent)
            begin = 0
            for rank in others:
                for part, offset, length in receiving[rank].take(self._round_elements):
                    first = part.destination + offset
                    self._ring.copy(incoming[begin : begin + length], stored[first : first + length])
                    begin += length
            # The next round overwrites the buffers of the device.
            self._ring.flush()
            self._note_progress()

    def _round_size(self, number: int, source: int, owner: int) -> int:
        """Return how many values ``source`` sends to ``owner`` in the round ``number``, counted from 0."""
        if source == owner:
            return 0
        left = self._plan.elements(source, owner) - number * self._round_elements
        return max(0, min(left, self._round_elements))

    def _exchanged_extents(self) -> list[Extents]:
        """Return the extents of the fragments of all ranks, in the order of ranks."""
        names = list(self._engine.parameter_shapes)
        own = []
        for name in names:
            fragment = self._engine.read_fragment(name, STATE_KINDS[0])
            own.append((fragment.start, fragment.values.numel()))
        if self._world_size == 1:
            return [dict(zip(names, own, strict=True))]
        sent = torch.tensor(own, dtype=torch.int64, device=self._engine.device).flatten()
        received = torch.empty(self._world_size * sent.numel(), dtype=torch.int64, device=self._engine.device)
        dist.all_gather_into_tensor(received, sent)
        by_rank = received.view(self._world_size, len(names), 2).tolist()
        return [{name: (start, length) for name, (start, length) in zip(names, of, strict=True)} for of in by_rank]
