"""The trained parameters of the plain engine: a weight in bf16 and its remainder are exactly an fp32 value, gradients
are added up in fp32, their norm is exact, and an update of many small parameters runs few kernels.
"""

from __future__ import annotations

import math
from collections import Counter
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from finetune_trainer.engine import masters
from finetune_trainer.engine.engine import FIRST_MOMENT, MASTER, SECOND_MOMENT
from finetune_trainer.engine.gradient_norm import clipping_factor
from finetune_trainer.engine.masters import Bf16Masters, Fp32Masters
from finetune_trainer.engine.state import STATE_KINDS
from tests.trainer.allocations import memory_of
from tests.trainer.engine_runs import (
    RATE,
)
from tests.trainer.kernel_counts import VIEWS


def bf16_masters(*values: torch.Tensor) -> tuple[Bf16Masters, list[torch.nn.Parameter]]:
    """Return masters whose fp32 values are ``values``, and their parameters in bf16. The names are 0, 1, ..."""
    parameters = [torch.nn.Parameter(torch.zeros(value.shape, dtype=torch.bfloat16)) for value in values]
    made = Bf16Masters({str(index): each for index, each in enumerate(parameters)}, weight_decay=0.0)
    with torch.no_grad():
        for index, value in enumerate(values):
            moment = torch.zeros(value.shape)
            made.write(str(index), {MASTER: value, FIRST_MOMENT: moment, SECOND_MOMENT: moment})
    return made, parameters


def of_bits(bits: list[int]) -> torch.Tensor:
    return torch.tensor(bits, dtype=torch.int64).to(torch.int32).view(torch.float32)


LARGEST = 0x7F7FFFFF
"""The bits of the largest fp32 number."""


@given(st.lists(st.tuples(st.integers(0, LARGEST), st.booleans()), min_size=1, max_size=20), st.integers(1, 7))
@example([(0x3F808000, False), (0x3F818000, True), (0x00008000, True), (LARGEST, True), (1, True), (0, True)], 2)
def test_weight_and_remainder_are_exactly_the_fp32_value(numbers: list[tuple[int, bool]], size: int) -> None:
    """The example has values in the middle between two numbers in bf16, of which one is rounded up and one down, and
    values that bf16 can't hold. With ``size`` values in a batch, a parameter has parts in several batches."""
    values = of_bits([bits - (1 << 31 if negative else 0) for bits, negative in numbers])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(masters, "BATCH_ELEMENTS", size)
        made, parameters = bf16_masters(values, values.flip(0))
        for name, value, parameter in zip("01", (values, values.flip(0)), parameters, strict=True):
            assert torch.equal(made.read(name, MASTER).view(torch.int32), value.view(torch.int32))
            assert torch.equal(parameter.detach().view(torch.int16), value.to(torch.bfloat16).view(torch.int16))
        made.close()


def test_a_parameter_that_is_not_contiguous_trains_in_its_place() -> None:
    parameter = torch.nn.Parameter(torch.arange(6.0).view(2, 3).T.to(torch.bfloat16))
    made = Bf16Masters({"0": parameter}, weight_decay=0.0)
    (parameter * torch.tensor([[1.0, -1.0]], dtype=torch.bfloat16)).sum().backward()
    with torch.no_grad():
        made.update(0.5, gradient_factor=1.0)
        found = made.read("0", MASTER)
    torch.testing.assert_close(found, torch.tensor([[-0.5, 3.5], [0.5, 4.5], [1.5, 5.5]]))
    assert parameter.tolist() == [[-0.5, 3.5], [0.5, 4.5], [1.5, 5.5]]


def test_gradients_of_many_micro_batches_are_added_in_fp32() -> None:
    """In bf16, a sum of 256 would not grow any more when 1 is added."""
    made, (parameter,) = bf16_masters(torch.ones(4))
    for _ in range(300):
        parameter.sum().backward()
        assert parameter.grad is None
    assert float(made.gradient_norm()) == pytest.approx(600, rel=1e-6)


USED = ((0, 1, 2, 3), (0, 2), (3,), (1, 2, 3))
"""Which of four parameters have a gradient in each of four backward passes."""


def first_moments(small: int, waiting: int, batch: int, monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """Return the first moments after an update with the gradients of the passes USED."""
    for name, size in (("SMALL_ELEMENTS", small), ("WAITING_ELEMENTS", waiting), ("BATCH_ELEMENTS", batch)):
        monkeypatch.setattr(masters, name, size)
    made, parameters = bf16_masters(torch.zeros(3), torch.zeros(2, 3), torch.zeros(1), torch.zeros(8))
    generator = torch.Generator().manual_seed(5)
    for used in USED:
        leaves = [parameters[number] for number in used]
        gradients = [torch.randn(leaf.shape, generator=generator).to(torch.bfloat16) for leaf in leaves]
        torch.autograd.backward(leaves, gradients)
        made.end_backward()
    with torch.no_grad():
        made.update(RATE, gradient_factor=1.0)
        return [made.read(str(number), FIRST_MOMENT) for number in range(len(parameters))]


@pytest.mark.parametrize("batch", [5, 1000], ids=["in parts", "whole"])
@pytest.mark.parametrize(("small", "waiting"), [(4, 5), (7, 9), (1000, 1000)])
def test_gradients_that_wait_for_others_add_up_to_the_same_bits(
    small: int, waiting: int, batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = first_moments(1, 1, batch, monkeypatch)
    found = first_moments(small, waiting, batch, monkeypatch)
    assert all(float(moment.abs().min()) > 0 for moment in wanted)
    for ours, theirs in zip(found, wanted, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("waits", [False, True], ids=["at once", "joined"])
def test_a_gradient_is_added_once_and_is_not_left_behind(waits: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing but the next backward pass tells masters without an engine that a pass has ended."""
    monkeypatch.setattr(masters, "SMALL_ELEMENTS", 100 if waits else 1)
    made, parameters = bf16_masters(torch.zeros(2), torch.zeros(2))
    for _ in range(2):
        (parameters[0].sum() + 2 * parameters[1].sum()).backward()
    assert float(made.gradient_norm()) == pytest.approx(math.sqrt(2 * 4 + 2 * 16), rel=1e-6)
    made.drop_gradient()
    assert float(made.gradient_norm()) == 0
    parameters[0].sum().backward()
    made.drop_gradient()
    assert float(made.gradient_norm()) == 0


def test_the_norm_of_a_large_gradient_is_not_added_up_in_fp32() -> None:
    """torch's own sum of 2^22 equal squares in fp32 on the CPU is wrong by more than this test allows."""
    parameter = torch.nn.Parameter(torch.zeros(1 << 22))
    made = Fp32Masters({"0": parameter}, weight_decay=0.0)
    parameter.grad = torch.full_like(parameter, 0.1)
    wanted = 0.1 * math.sqrt(parameter.numel())
    assert float(made.gradient_norm()) == pytest.approx(wanted, rel=1e-6)
    assert float(torch.linalg.vector_norm(parameter.grad)) != pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize(
    ("norm", "largest", "factor"),
    [(0.5, 1.0, 1.0), (4.0, 1.0, 0.25), (4.0, 2.0, 0.5), (4.0, 0.0, 1.0), (0.0, 1.0, 1.0)],
)
def test_clipping_makes_a_large_norm_the_largest_that_is_allowed(norm: float, largest: float, factor: float) -> None:
    assert clipping_factor(norm, largest) == pytest.approx(factor, rel=1e-6)


@pytest.mark.parametrize("kind", [Fp32Masters, Bf16Masters])
def test_a_parameter_without_a_gradient_decays_as_with_zero(kind: Any) -> None:
    dtype = torch.float32 if kind is Fp32Masters else torch.bfloat16
    parameters = {name: torch.nn.Parameter(torch.ones(2, dtype=dtype)) for name in ("used", "unused")}
    made = kind(parameters, weight_decay=0.5)
    parameters["used"].sum().backward()
    with torch.no_grad():
        made.update(0.1, gradient_factor=1.0)
        used, unused = ({kind: made.read(name, kind) for kind in STATE_KINDS} for name in ("used", "unused"))
    assert unused[MASTER].tolist() == pytest.approx([0.95, 0.95])
    assert unused[FIRST_MOMENT].tolist() == unused[SECOND_MOMENT].tolist() == [0, 0]
    assert used[MASTER].tolist() == pytest.approx([0.85, 0.85])


def test_reading_a_large_parameter_needs_its_values_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A parameter has parts in 20 batches here, and one of half a billion values in 32."""
    size, number = 10_000, 20
    monkeypatch.setattr(masters, "BATCH_ELEMENTS", size)
    made, _ = bf16_masters(torch.randn(number, size))
    with torch.no_grad():
        for kind in STATE_KINDS:
            _, most = memory_of(partial(made.read, "0", kind))
            assert most <= 4 * number * size + 16 * size, kind


class CountedKernels(TorchDispatchMode):  # type: ignore[misc]  # torch has no types here
    """Counts the functions of torch that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names[function.overloadpacket.__name__] += 1
        return function(*args, **(kwargs or {}))


def test_an_update_of_many_small_parameters_runs_as_few_kernels_as_of_two() -> None:
    counts = []
    for number in (2, 200):
        made, parameters = bf16_masters(*[torch.ones(8)] * number)
        torch.stack(parameters).sum().backward()
        made.end_backward()
        with torch.no_grad(), CountedKernels() as counted:
            made.update(RATE, gradient_factor=0.5)
        # The views of the single parameters are functions, but no kernels.
        counts.append(counted.names.total())
    assert counts[1] == counts[0] <= 40


def test_the_gradients_of_many_small_parameters_are_added_by_as_few_kernels_as_those_of_two() -> None:
    counts = []
    for number in (2, 200):
        made, parameters = bf16_masters(*[torch.ones(8)] * number)
        for _ in range(2):
            torch.stack(parameters).sum().backward()
            with torch.no_grad(), CountedKernels() as counted:
                made.end_backward()
            counts.append({name: count for name, count in counted.names.items() if name not in VIEWS})
    assert counts[:2] == counts[2:] == [{"cat": 1, "_to_copy": 1}, {"cat": 1, "add_": 1}]
