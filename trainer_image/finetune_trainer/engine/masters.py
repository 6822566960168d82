"""The fp32 values of trained parameters in one process, with their gradients and AdamW's moments, and AdamW's update.

`plain_engine.py` makes one object for each parameter group of the optimizer: `Fp32Masters` where the model computes in
fp32, and `Bf16Masters` where it computes in bf16.

AdamW must update fp32 values, because most updates are too small to change a number in bf16. An fp32 value (4 bytes)
beside a weight in bf16 (2 bytes) would store the upper half of each value twice. So `Bf16Masters` stores the weight and
a remainder of 16 bits, which together are the exact fp32 value. Apex has the same format in its
DistributedFusedAdam (`store_param_remainders`), and TransformerEngine in its FusedAdam. Unlike there, a weight is the
fp32 value rounded to nearest even, as torch and DeepSpeed round it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch.optim.adamw import adamw

from finetune_trainer.engine.engine import BETAS, EPSILON, FIRST_MOMENT, MASTER, SECOND_MOMENT
from finetune_trainer.engine.gradient_norm import sum_of_squares
from finetune_trainer.engine.host_copy import HostCopy
from finetune_trainer.engine.state import STATE_KINDS

BATCH_ELEMENTS = 1 << 24
"""`Bf16Masters` updates at most this number of values at a time. While it does so, it needs up to 11 bytes for each of
them: 176 MiB."""
SMALL_ELEMENTS = 1 << 20
"""A gradient with fewer values waits for others, and all of them are joined and added with two kernels. Joined, larger
gradients would take more time on a GPU than the start of a kernel for each of them."""
WAITING_ELEMENTS = 1 << 22
"""Number of values from which gradients wait no longer: 8 MiB in bf16, and as many bytes where they are joined."""
TIE = 1 << 15
"""Distance, as a difference of bits, from an fp32 value in the middle between two numbers in bf16 to both of them."""


class Masters(Protocol):
    """The trained parameters of one parameter group: fp32 values, moments and gradients."""

    def end_backward(self) -> None:
        """Add up what the last backward pass has left. The engine calls this after each backward pass."""

    def gradient_norm(self) -> torch.Tensor:
        """Return the L2 norm of the accumulated gradient, a scalar in fp32."""

    def update(self, rate: float, *, gradient_factor: float) -> None:
        """Multiply the gradient by ``gradient_factor``, make one update of AdamW with the learning rate ``rate``, and
        drop the gradient. A parameter without a gradient is updated with a gradient of zeros, as ZeRO stages 1 to 3
        do."""

    def drop_gradient(self) -> None:
        """Drop the accumulated gradient."""

    def reset(self, updates: int) -> None:
        """Set all moments to zero, and the number of updates to ``updates``."""

    def read(self, name: str, kind: str) -> torch.Tensor:
        """Return the fp32 value of a parameter, or the moment of it that ``kind`` names, with the shape of the
        parameter. The tensor may be that of the optimizer itself."""

    def write(self, name: str, tensors: Mapping[str, torch.Tensor]) -> None:
        """Set fp32 value and moments of a parameter, and its weight."""

    def close(self) -> None:
        """Stop collecting gradients."""


class Fp32Masters:
    """Parameters in fp32, which are their own masters: 16 bytes a parameter with gradient and moments."""

    def __init__(self, parameters: Mapping[str, torch.nn.Parameter], *, weight_decay: float) -> None:
        self._parameters = dict(parameters)
        self._optimizer = torch.optim.AdamW(
            list(self._parameters.values()), betas=BETAS, eps=EPSILON, weight_decay=weight_decay, fused=True
        )
        self.reset(0)

    def end_backward(self) -> None:
        """Do nothing, because autograd itself accumulates the gradients."""

    def gradient_norm(self) -> torch.Tensor:
        gradients = [parameter.grad for parameter in self._parameters.values() if parameter.grad is not None]
        return sum_of_squares(gradients).sqrt()

    def update(self, rate: float, *, gradient_factor: float) -> None:
        for parameter in self._parameters.values():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            elif gradient_factor != 1:
                parameter.grad.mul_(gradient_factor)
        self._optimizer.param_groups[0]["lr"] = rate
        self._optimizer.step()
        self.drop_gradient()

    def drop_gradient(self) -> None:
        self._optimizer.zero_grad(set_to_none=True)

    def reset(self, updates: int) -> None:
        for parameter in self._parameters.values():
            self._optimizer.state[parameter] = {
                "step": torch.tensor(float(updates), device=parameter.device),
                FIRST_MOMENT: torch.zeros_like(parameter),
                SECOND_MOMENT: torch.zeros_like(parameter),
            }

    def read(self, name: str, kind: str) -> torch.Tensor:
        parameter = self._parameters[name]
        if kind == MASTER:
            return parameter.detach()
        moment: torch.Tensor = self._optimizer.state[parameter][kind]
        return moment

    def write(self, name: str, tensors: Mapping[str, torch.Tensor]) -> None:
        for kind in STATE_KINDS:
            self.read(name, kind).copy_(tensors[kind])

    def close(self) -> None:
        """Do nothing, because autograd itself accumulates the gradients."""


class Bf16Masters:
    """Parameters in bf16, each with a 16-bit remainder, moments and a gradient in fp32: 16 bytes a parameter.

    The values of all parameters are stored one after the other in batches of at most BATCH_ELEMENTS values. A large
    parameter has parts in several batches, and a batch may have many small parameters. So an update runs few kernels
    also where there are hundreds of small adapters, and its temporary tensors are small also where a parameter is
    large.
    """

    def __init__(self, parameters: Mapping[str, torch.nn.Parameter], *, weight_decay: float) -> None:
        self._weight_decay = weight_decay
        self._updates = 0
        self._shapes = {name: parameter.shape for name, parameter in parameters.items()}
        self._parts: dict[str, list[_Part]] = {name: [] for name in parameters}
        self._batches = [_Batch(slices) for slices in _batched(parameters)]
        for batch in self._batches:
            start = 0
            for piece in batch.slices:
                self._parts[piece.name].append(_Part(batch, start, piece))
                start += piece.weight.numel()
        self._waiting: dict[str, torch.Tensor] = {}
        """Small gradients that are not in the sums yet, flat, by the name of their parameter."""
        self._waiting_elements = 0
        self._hooks = [
            parameter.register_post_accumulate_grad_hook(self._collector(name))
            for name, parameter in parameters.items()
        ]

    def _collector(self, name: str) -> Any:
        """Return a function that takes the gradient of the last backward pass from its parameter, and adds it to the
        fp32 gradient, now or with others. So gradients exist in bf16 for one large parameter at a time."""

        def collect(parameter: torch.Tensor) -> None:
            assert parameter.grad is not None
            gradient = parameter.grad.reshape(-1)
            parameter.grad = None
            if gradient.numel() >= SMALL_ELEMENTS:
                self._add({name: gradient})
                return
            if name in self._waiting:
                self.end_backward()
            self._waiting[name] = gradient
            self._waiting_elements += gradient.numel()
            if self._waiting_elements >= WAITING_ELEMENTS:
                self.end_backward()

        return collect

    def end_backward(self) -> None:
        self._add(self._taken())

    def _taken(self) -> dict[str, torch.Tensor]:
        """Return the gradients that wait. They wait no longer."""
        waiting, self._waiting, self._waiting_elements = self._waiting, {}, 0
        return waiting

    def _add(self, gradients: Mapping[str, torch.Tensor]) -> None:
        """Add the flat ``gradients`` of parameters to the fp32 gradients."""
        pieces: dict[_Batch, list[tuple[int, torch.Tensor]]] = {}
        for name, gradient in gradients.items():
            for part in self._parts[name]:
                pieces.setdefault(part.batch, []).append((part.start, part.of_parameter(gradient)))
        for batch, own in pieces.items():
            batch.add_gradients(own)

    def gradient_norm(self) -> torch.Tensor:
        self.end_backward()
        return sum_of_squares([batch.gradient for batch in self._batches if batch.gradient is not None]).sqrt()

    def update(self, rate: float, *, gradient_factor: float) -> None:
        self.end_backward()
        before: _Batch | None = None
        for batch in self._batches:
            gradient = batch.gradient_buffer()
            if gradient_factor != 1:
                gradient.mul_(gradient_factor)
            masters = batch.masters(batch.slices)
            adamw(
                [masters],
                [gradient],
                [batch.moments[FIRST_MOMENT]],
                [batch.moments[SECOND_MOMENT]],
                [],
                # The function adds one update itself.
                [torch.full((), float(self._updates), device=masters.device)],
                fused=True,
                amsgrad=False,
                beta1=BETAS[0],
                beta2=BETAS[1],
                lr=rate,
                weight_decay=self._weight_decay,
                eps=EPSILON,
                maximize=False,
            )
            # The gradient of this batch is freed before more memory is needed.
            del gradient
            batch.gradient = None
            batch.set_masters(batch.slices, masters)
            if before is not None:
                # While the CPU waits for the batch before, a GPU has this one to compute.
                before.settle()
            before = batch
        self._updates += 1

    def drop_gradient(self) -> None:
        self._taken()
        for batch in self._batches:
            batch.gradient = None

    def reset(self, updates: int) -> None:
        self._updates = updates
        for batch in self._batches:
            for moment in batch.moments.values():
                moment.zero_()

    def read(self, name: str, kind: str) -> torch.Tensor:
        shape, parts = self._shapes[name], self._parts[name]
        if len(parts) == 1:
            return parts[0].read(kind).view(shape)
        # The parts are read one after the other, so that memory holds the values of a large parameter once.
        values = torch.empty(shape, dtype=torch.float32, device=self._batches[0].device)
        for part in parts:
            part.of_parameter(values.view(-1)).copy_(part.read(kind))
        return values

    def write(self, name: str, tensors: Mapping[str, torch.Tensor]) -> None:
        flat = {kind: tensor.reshape(-1) for kind, tensor in tensors.items()}
        for part in self._parts[name]:
            masters = part.of_parameter(flat[MASTER]).to(part.slice.weight.device, torch.float32)
            part.batch.set_masters([part.slice], masters, start=part.start)
            for kind, moment in part.batch.moments.items():
                part.of(moment).copy_(part.of_parameter(flat[kind]))

    def close(self) -> None:
        self._taken()
        for hook in self._hooks:
            hook.remove()


class _Slice(NamedTuple):
    """Consecutive values of a parameter, as a flat view of the parameter that begins at ``start``."""

    name: str
    start: int
    weight: torch.Tensor


class _Batch:
    """Values of one parameter or of several, stored one after the other, at most BATCH_ELEMENTS of them."""

    def __init__(self, slices: Sequence[_Slice]) -> None:
        """Take the weights of ``slices`` as the fp32 values."""
        self.slices = list(slices)
        size, self.device = sum(piece.weight.numel() for piece in slices), slices[0].weight.device
        self._remainder = torch.zeros(size, dtype=torch.int16, device=self.device)
        self._ties = torch.zeros(0, dtype=torch.int64, device=self.device)
        """Positions of the values whose remainder is TIE, which int16 can't store: about one value in 2^17. Here -TIE
        is stored for them."""
        self._unsettled: tuple[torch.Tensor, HostCopy] | None = None
        """After an update, until `settle` replaces `_ties`: a mask of these values, and their number."""
        self.moments = {kind: torch.zeros(size, device=self.device) for kind in (FIRST_MOMENT, SECOND_MOMENT)}
        self.gradient: torch.Tensor | None = None
        """The accumulated gradient in fp32, flat; None before the first backward pass of a step."""

    def gradient_buffer(self) -> torch.Tensor:
        """Return the accumulated gradient, which is zero before the first backward pass of a step."""
        if self.gradient is None:
            self.gradient = torch.zeros_like(self.moments[FIRST_MOMENT])
        return self.gradient

    def add_gradients(self, pieces: Iterable[tuple[int, torch.Tensor]]) -> None:
        """Add ``pieces`` to the accumulated gradient. Each is flat, with the position of its first value in the batch.
        Pieces that lie side by side are joined, and added with one kernel."""
        for start, values in _neighbours(pieces):
            if self.gradient is None and values.numel() == self._remainder.numel():
                # The first gradient of a step needs no zeros to be added to.
                self.gradient = values.float()
            else:
                self.gradient_buffer()[start : start + values.numel()].add_(values)

    def masters(self, slices: Sequence[_Slice], *, start: int = 0) -> torch.Tensor:
        """Return the fp32 values of consecutive ``slices`` of the batch as a new flat tensor. Their first value is at
        position ``start`` of the batch.

        The bits of an fp32 number are those of a number in bf16, followed by 16 bits more. Read as integers, the bits
        of numbers with the same sign have the order of the numbers' magnitudes. So the difference between the bits of
        a value and those of its nearest number in bf16 is from -TIE to TIE.
        """
        masters = _joined([piece.weight for piece in slices]).float()
        stop = start + masters.numel()
        bits = masters.view(torch.int32).add_(self._remainder[start:stop])
        bits[self._ties_between(start, stop) - start] += 2 * TIE
        return masters

    def set_masters(self, slices: Sequence[_Slice], masters: torch.Tensor, *, start: int = 0) -> None:
        """Set the fp32 values of consecutive ``slices`` to ``masters``, a flat tensor, and the weights to the nearest
        numbers in bf16. The first value is at position ``start`` of the batch. Where all values of the batch are set,
        the CPU does not wait for a GPU."""
        stop = start + masters.numel()
        rounded = masters.to(torch.bfloat16)
        weights = [piece.weight for piece in slices]
        torch._foreach_copy_(weights, rounded.split([weight.numel() for weight in weights]))
        bits = rounded.float().view(torch.int32)
        del rounded
        remainder = torch.sub(masters.view(torch.int32), bits, out=bits)
        ties = remainder == TIE
        # The conversion to int16 keeps the lower 16 bits, so that TIE becomes -TIE.
        self._remainder[start:stop].copy_(remainder)
        if masters.numel() == self._remainder.numel():
            self._unsettled = ties, HostCopy(ties.sum())
            return
        self.settle()
        others = self._ties[(self._ties < start) | (self._ties >= stop)]
        self._ties = torch.cat([others, ties.nonzero().flatten() + start])

    def settle(self) -> None:
        """Store the positions of the values whose remainder is TIE, instead of a mask. The CPU waits until a GPU has
        counted them, which it has where the CPU has read a later result of the GPU since."""
        if self._unsettled is not None:
            ties, count = self._unsettled
            self._ties, self._unsettled = torch.nonzero_static(ties, size=int(count.read())).flatten(), None

    def _ties_between(self, start: int, stop: int) -> torch.Tensor:
        self.settle()
        # In an update the whole batch is read. Then no mask is needed, whose number of values a GPU would have to tell
        # the CPU first.
        if stop - start == self._remainder.numel():
            return self._ties
        return self._ties[(self._ties >= start) & (self._ties < stop)]


class _Part(NamedTuple):
    """The part of a parameter that lies in one batch."""

    batch: _Batch
    start: int
    """Position of the first value in the batch."""
    slice: _Slice

    def read(self, kind: str) -> torch.Tensor:
        """Return the fp32 values of this part, or the moment of them that ``kind`` names, flat."""
        if kind == MASTER:
            return self.batch.masters([self.slice], start=self.start)
        return self.of(self.batch.moments[kind])

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the values of this part as a view of ``tensor``, which has the values of the whole batch."""
        return tensor[self.start : self.start + self.slice.weight.numel()]

    def of_parameter(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the values of this part as a view of ``tensor``, which has the values of the whole parameter, flat."""
        return tensor[self.slice.start : self.slice.start + self.slice.weight.numel()]


def _batched(parameters: Mapping[str, torch.nn.Parameter]) -> Iterator[list[_Slice]]:
    """Yield the values of all ``parameters`` in their order, in lists of together at most BATCH_ELEMENTS values."""
    batch: list[_Slice] = []
    room = BATCH_ELEMENTS
    for name, parameter in parameters.items():
        # Only a contiguous tensor has a flat view.
        parameter.data = parameter.data.contiguous()
        flat = parameter.data.view(-1)
        for start in range(0, flat.numel(), BATCH_ELEMENTS):
            part = flat[start : start + BATCH_ELEMENTS]
            if part.numel() > room:
                yield batch
                batch, room = [], BATCH_ELEMENTS
            batch.append(_Slice(name, start, part))
            room -= part.numel()
    if batch:
        yield batch


def _neighbours(pieces: Iterable[tuple[int, torch.Tensor]]) -> Iterator[tuple[int, torch.Tensor]]:
    """Yield ``pieces``, flat tensors with their positions, in the order of their positions. Those that follow each
    other without a gap are joined."""
    first, stop = 0, 0
    run: list[torch.Tensor] = []
    for start, values in sorted(pieces, key=lambda piece: piece[0]):
        if run and start != stop:
            yield first, _joined(run)
            run = []
        if not run:
            first = start
        run.append(values)
        stop = start + values.numel()
    if run:
        yield first, _joined(run)


def _joined(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return flat ``tensors`` as one, without a copy where there is only one."""
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors))
