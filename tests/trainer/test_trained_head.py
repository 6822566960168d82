"""The loss of a trained head, with gradients from the forward pass, is that of cross-entropy."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional

from finetune_trainer.data.batches import IGNORED
from finetune_trainer.loss.kernels import frozen_head_loss
from finetune_trainer.loss.trained_head import trained_head_loss

HeadLoss = Callable[..., torch.Tensor]
TARGETS = torch.tensor([1, 5, IGNORED, 0, 10, 7, IGNORED, 2])


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
