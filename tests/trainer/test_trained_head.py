"""The loss of a trained head, with gradients from the forward pass, is that of cross-entropy."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from finetune_trainer.data.batches import IGNORED
from finetune_trainer.loss import trained_head
from finetune_trainer.loss.kernels import frozen_head_loss
from finetune_trainer.loss.trained_head import trained_head_loss

HeadLoss = Callable[..., torch.Tensor]
TARGETS = torch.tensor([1, 5, IGNORED, 0, 10, 7, IGNORED, 2])


class Operators(TorchDispatchMode):  # type: ignore[misc]  # torch has no types here
    """Counts the operators that run in the `with` block."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names[operator.overloadpacket.__name__] += 1
        return operator(*args, **(kwargs or {}))


@pytest.mark.parametrize("chunk_rows", [1, 3, 100])
@pytest.mark.parametrize("bias", [False, True], ids=["without bias", "with bias"])
@pytest.mark.parametrize("excluded", [None, torch.tensor([3, 9])], ids=["all tokens", "without some tokens"])
def test_loss_and_gradients_under_a_trained_head_are_those_of_cross_entropy(
    chunk_rows: int, bias: bool, excluded: torch.Tensor | None
) -> None:
    torch.manual_seed(0)
    plain, fused = nn.Linear(6, 11, bias=bias), nn.Linear(6, 11, bias=bias)
    fused.load_state_dict(plain.state_dict())
    wanted, found = (torch.randn(8, 6, generator=torch.Generator().manual_seed(1)).requires_grad_() for _ in range(2))
    logits = plain(wanted)
    if excluded is not None:
        logits = logits.index_fill(1, excluded, float("-inf"))
    expected = functional.cross_entropy(logits, TARGETS, ignore_index=IGNORED, reduction="sum")
    (2.5 * expected).backward()
    loss = trained_head_loss(found, fused, TARGETS, excluded=excluded, chunk_rows=chunk_rows)
    (2.5 * loss).backward()
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(found.grad, wanted.grad, rtol=1e-6, atol=1e-6)
    for ours, theirs in zip(fused.parameters(), plain.parameters(), strict=True):
        assert theirs.grad is not None
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("head_loss", [frozen_head_loss, trained_head_loss])
def test_a_row_without_a_target_adds_nothing_also_where_token_0_is_excluded(head_loss: HeadLoss) -> None:
    torch.manual_seed(0)
    head, targets, excluded = nn.Linear(6, 11), torch.tensor([1, IGNORED, 7, IGNORED]), torch.tensor([0, 9])
    wanted, found = (torch.randn(4, 6, generator=torch.Generator().manual_seed(1)).requires_grad_() for _ in range(2))
    logits = head(wanted).index_fill(1, excluded, float("-inf"))
    expected = functional.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum")
    expected.backward()
    loss = head_loss(found, head, targets, excluded=excluded, chunk_rows=3)
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(found.grad, wanted.grad, rtol=1e-6, atol=1e-6)


def test_a_frozen_weight_gets_no_gradient_and_a_second_backward_pass_is_refused() -> None:
    head = nn.Linear(6, 11)
    head.weight.requires_grad_(False)
    loss = trained_head_loss(torch.randn(8, 6), head, TARGETS, excluded=None, chunk_rows=4)
    loss.backward(retain_graph=True)
    assert head.weight.grad is None
    assert head.bias.grad is not None
    with pytest.raises(RuntimeError, match="once only"):
        loss.backward()


def test_in_bf16_the_loss_and_the_gradient_are_right_within_rounding() -> None:
    torch.manual_seed(0)
    head = nn.Linear(64, 100, bias=False)
    hidden, targets = torch.randn(32, 64), torch.randint(0, 100, (32,))
    functional.cross_entropy(head(hidden), targets, reduction="sum").backward()
    half = nn.Linear(64, 100, bias=False).to(torch.bfloat16)
    half.load_state_dict(head.state_dict())
    loss = trained_head_loss(hidden.bfloat16(), half, targets, excluded=None, chunk_rows=8)
    loss.backward()
    assert head.weight.grad is not None
    assert half.weight.grad is not None
    largest = float(head.weight.grad.abs().max())
    assert float((half.weight.grad.float() - head.weight.grad).abs().max()) < 0.02 * largest


@pytest.mark.parametrize("trained", [True, False], ids=["no_grad", "nothing trained"])
def test_an_evaluation_pays_for_the_loss_only(trained: bool) -> None:
    """Of the three products with the size of the head, an evaluation computes the one that makes the logits."""
    head = nn.Linear(6, 11).requires_grad_(trained)
    hidden = torch.randn(8, 6, generator=torch.Generator().manual_seed(1))
    training, scoring = Operators(), Operators()
    with training:
        wanted = trained_head_loss(
            hidden.clone().requires_grad_(), nn.Linear(6, 11), TARGETS, excluded=None, chunk_rows=4
        )
    with scoring, torch.set_grad_enabled(not trained):
        loss = trained_head_loss(hidden, head, TARGETS, excluded=None, chunk_rows=4)
    assert not loss.requires_grad
    assert wanted.requires_grad
    products = ("mm", "addmm", "addmm_")
    assert sum(training.names[name] for name in products) == 2 * 3
    assert sum(scoring.names[name] for name in products) == 2
    assert scoring.names["exp_"] == scoring.names["zeros_like"] == scoring.names["empty_like"] == 0
    expected = functional.cross_entropy(head(hidden), TARGETS, ignore_index=IGNORED, reduction="sum")
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("rows_bytes", [1 << 26, 40], ids=["at once", "row by row"])
def test_the_factor_of_the_loss_is_not_rounded_to_bf16(monkeypatch: pytest.MonkeyPatch, rows_bytes: int) -> None:
    """A third, rounded to bf16, would change each gradient by 0.13%."""
    monkeypatch.setattr(trained_head, "SCALED_ROWS_BYTES", rows_bytes)
    found = []
    for factor in (1.0, 1 / 3):
        torch.manual_seed(0)
        head = nn.Linear(16, 11).to(torch.bfloat16)
        hidden = torch.randn(8, 16).to(torch.bfloat16).requires_grad_()
        (factor * trained_head_loss(hidden, head, TARGETS, excluded=None, chunk_rows=4)).backward()
        found.append([tensor.grad for tensor in (hidden, head.weight, head.bias)])
    for whole, third in zip(*found, strict=True):
        assert whole is not None
        assert third is not None
        assert torch.equal(third, (whole.float() * torch.tensor(1 / 3)).to(torch.bfloat16))


def test_gradients_of_the_gradients_are_refused() -> None:
    hidden = torch.randn(8, 6, requires_grad=True)
    loss = trained_head_loss(hidden, nn.Linear(6, 11), TARGETS, excluded=None, chunk_rows=4)
    (gradient,) = torch.autograd.grad(loss.square(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()
