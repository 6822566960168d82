"""The loss of a linear head, with gradients from the forward pass, is that of cross-entropy. A head that is linear in
torch's own code is computed so, and no other one."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

from finetune_trainer.data.batches import IGNORED
from finetune_trainer.loss import head as head_module
from finetune_trainer.loss import linear_head
from finetune_trainer.loss.head import CHUNK_LOGITS, CPU_CHUNK_LOGITS
from finetune_trainer.loss.linear_head import linear_head_loss
from finetune_trainer.loss.objective import Objective
from tests.trainer.test_objective import FIRST, SECOND, OneProcess, batch_of, model_of

TARGETS = torch.tensor([1, 5, IGNORED, 0, 10, 7, IGNORED, 2])


class Operators(TorchDispatchMode):  # type: ignore[misc]  # torch has no types here
    """Counts the operators that run in the `with` block."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names[operator.overloadpacket.__name__] += 1
        return operator(*args, **(kwargs or {}))


@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
@pytest.mark.parametrize("chunk_rows", [1, 3, 100])
@pytest.mark.parametrize("bias", [False, True], ids=["without bias", "with bias"])
@pytest.mark.parametrize("excluded", [None, torch.tensor([3, 9])], ids=["all tokens", "without some tokens"])
def test_loss_and_gradients_are_those_of_cross_entropy(
    chunk_rows: int, trained: bool, bias: bool, excluded: torch.Tensor | None
) -> None:
    torch.manual_seed(0)
    plain, fused = (nn.Linear(6, 11, bias=bias).requires_grad_(trained) for _ in range(2))
    fused.load_state_dict(plain.state_dict())
    wanted, found = (torch.randn(8, 6, generator=torch.Generator().manual_seed(1)).requires_grad_() for _ in range(2))
    logits = plain(wanted)
    if excluded is not None:
        logits = logits.index_fill(1, excluded, float("-inf"))
    expected = functional.cross_entropy(logits, TARGETS, ignore_index=IGNORED, reduction="sum")
    (2.5 * expected).backward()
    loss = linear_head_loss(found, fused, TARGETS, excluded=excluded, chunk_rows=chunk_rows)
    (2.5 * loss).backward()
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(found.grad, wanted.grad, rtol=1e-6, atol=1e-6)
    for ours, theirs in zip(fused.parameters(), plain.parameters(), strict=True):
        assert (theirs.grad is not None) == trained
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
def test_a_row_without_a_target_adds_nothing_also_where_token_0_is_excluded(trained: bool) -> None:
    torch.manual_seed(0)
    head = nn.Linear(6, 11).requires_grad_(trained)
    targets, excluded = torch.tensor([1, IGNORED, 7, IGNORED]), torch.tensor([0, 9])
    wanted, found = (torch.randn(4, 6, generator=torch.Generator().manual_seed(1)).requires_grad_() for _ in range(2))
    logits = head(wanted).index_fill(1, excluded, float("-inf"))
    expected = functional.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum")
    expected.backward()
    loss = linear_head_loss(found, head, targets, excluded=excluded, chunk_rows=3)
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(found.grad, wanted.grad, rtol=1e-6, atol=1e-6)


def test_a_frozen_weight_gets_no_gradient_and_a_second_backward_pass_is_refused() -> None:
    head = nn.Linear(6, 11)
    head.weight.requires_grad_(False)
    loss = linear_head_loss(torch.randn(8, 6), head, TARGETS, excluded=None, chunk_rows=4)
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
    loss = linear_head_loss(hidden.bfloat16(), half, targets, excluded=None, chunk_rows=8)
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
        wanted = linear_head_loss(
            hidden.clone().requires_grad_(), nn.Linear(6, 11), TARGETS, excluded=None, chunk_rows=4
        )
    with scoring, torch.set_grad_enabled(not trained):
        loss = linear_head_loss(hidden, head, TARGETS, excluded=None, chunk_rows=4)
    assert not loss.requires_grad
    assert wanted.requires_grad
    products = ("mm", "addmm", "addmm_")
    assert sum(training.names[name] for name in products) == 2 * 3
    assert sum(scoring.names[name] for name in products) == 2
    of_training = ("_log_softmax_backward_data", "zeros_like", "empty_like")
    assert all(training.names[name] > 0 for name in of_training)
    assert all(scoring.names[name] == 0 for name in of_training)
    expected = functional.cross_entropy(head(hidden), TARGETS, ignore_index=IGNORED, reduction="sum")
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
@pytest.mark.parametrize("excluded", [None, torch.tensor([3, 9])], ids=["all tokens", "without some tokens"])
def test_with_the_expected_factor_the_gradients_have_the_bits_of_autograd(
    excluded: torch.Tensor | None, trained: bool, dtype: torch.dtype
) -> None:
    """A difference in the last bits would change an update of AdamW by much more, where the gradients of several
    examples cancel each other."""
    torch.manual_seed(0)
    factor = 1 / 37
    plain, fused = (nn.Linear(64, 97).requires_grad_(trained).to(dtype) for _ in range(2))
    fused.load_state_dict(plain.state_dict())
    values = torch.randn(40, 64).to(dtype)
    wanted, found = (values.clone().requires_grad_() for _ in range(2))
    targets = torch.randint(10, 97, (40,)).masked_fill(torch.rand(40) < 0.2, IGNORED)
    logits = plain(wanted).float()
    if excluded is not None:
        logits = logits.index_fill(1, excluded, float("-inf"))
    (functional.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum") * factor).backward()
    (linear_head_loss(found, fused, targets, excluded=excluded, chunk_rows=100, factor=factor) * factor).backward()
    assert wanted.grad is not None
    assert torch.equal(found.grad, wanted.grad)
    for ours, theirs in zip(fused.parameters(), plain.parameters(), strict=True):
        assert (theirs.grad is not None) == trained
        assert not trained or torch.equal(ours.grad, theirs.grad)


@pytest.mark.parametrize("factor", [0.25, 1 / 3, 1.0, 1e4])
def test_the_gradients_are_right_whatever_factor_was_expected(factor: float) -> None:
    torch.manual_seed(0)
    head, values = nn.Linear(16, 11), torch.randn(8, 16)
    found = []
    for expected in (1.0, factor):
        head.zero_grad()
        hidden = values.clone().requires_grad_()
        loss = linear_head_loss(hidden, head, TARGETS, excluded=None, chunk_rows=4, factor=expected)
        (loss / 7).backward()
        found.append((loss.detach(), hidden.grad, head.weight.grad, head.bias.grad))
    for wanted, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("factor", [0.0, -1.0, float("inf"), float("nan")])
def test_a_factor_that_loses_the_gradients_is_refused(factor: float) -> None:
    with pytest.raises(ValueError, match="positive and finite"):
        linear_head_loss(torch.randn(8, 6), nn.Linear(6, 11), TARGETS, excluded=None, chunk_rows=4, factor=factor)


@pytest.mark.parametrize("rows_bytes", [1 << 26, 40], ids=["at once", "row by row"])
def test_the_factor_of_the_loss_is_not_rounded_to_bf16(monkeypatch: pytest.MonkeyPatch, rows_bytes: int) -> None:
    """A third, rounded to bf16, would change each gradient by 0.13%."""
    monkeypatch.setattr(linear_head, "SCALED_ROWS_BYTES", rows_bytes)
    found = []
    for factor in (1.0, 1 / 3):
        torch.manual_seed(0)
        head = nn.Linear(16, 11).to(torch.bfloat16)
        hidden = torch.randn(8, 16).to(torch.bfloat16).requires_grad_()
        (factor * linear_head_loss(hidden, head, TARGETS, excluded=None, chunk_rows=4)).backward()
        found.append([tensor.grad for tensor in (hidden, head.weight, head.bias)])
    for whole, third in zip(*found, strict=True):
        assert whole is not None
        assert third is not None
        assert torch.equal(third, (whole.float() * torch.tensor(1 / 3)).to(torch.bfloat16))


def test_gradients_of_the_gradients_are_refused() -> None:
    hidden = torch.randn(8, 6, requires_grad=True)
    loss = linear_head_loss(hidden, nn.Linear(6, 11), TARGETS, excluded=None, chunk_rows=4)
    (gradient,) = torch.autograd.grad(loss.square(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that gets the number of rows at a time of each loss with gradients in the forward pass."""
    counted: list[int] = []

    def counting(*inputs: Any, chunk_rows: int, **options: Any) -> torch.Tensor:
        counted.append(chunk_rows)
        return linear_head_loss(*inputs, chunk_rows=chunk_rows, **options)

    monkeypatch.setattr(head_module, "linear_head_loss", counting)
    return counted


def objective_of(folder: Path, *, frozen: bool = False, **options: Any) -> tuple[Any, Objective]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).train()
    if frozen:
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone(), requires_grad=False)
    return model, Objective(model, **options)


@pytest.mark.parametrize(("frozen", "logits"), [(True, CPU_CHUNK_LOGITS), (False, CHUNK_LOGITS)])
def test_gradients_of_a_linear_head_are_computed_in_the_forward_pass(
    frozen: bool, logits: int, tiny_model: Path, calls: list[int]
) -> None:
    """A small chunk is faster on a CPU, but each chunk passes over the whole gradient of a trained weight."""
    batch = batch_of([FIRST], [SECOND])
    grads = []
    for fused in (True, False):
        model, objective = objective_of(tiny_model, frozen=frozen, fused_head=fused)
        objective.loss(model, batch).backward()
        grads.append({name: value.grad for name, value in model.named_parameters() if value.grad is not None})
        assert (model.lm_head.weight.grad is None) == frozen
        assert calls == [logits // model.config.vocab_size]
    assert grads[0].keys() == grads[1].keys()
    for name, gradient in grads[0].items():
        torch.testing.assert_close(gradient, grads[1][name], rtol=1e-5, atol=1e-6, msg=name)


def test_an_evaluation_computes_no_gradients_of_the_head(tiny_model: Path, calls: list[int]) -> None:
    model, objective = objective_of(tiny_model)
    with torch.no_grad():
        objective.loss(model, batch_of([FIRST]))
    assert calls == []


def test_a_head_that_is_more_than_a_linear_layer_keeps_autograd(tiny_model: Path, calls: list[int]) -> None:
    batch = batch_of([FIRST], [SECOND])
    adapted = OneProcess(model_of(tiny_model))
    torch.testing.assert_close(adapted.loss(batch), adapted.loss(batch, full_logits=True))
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).train()
    own = model.lm_head.forward
    model.lm_head.forward = lambda hidden: 2 * own(hidden)
    changed = Objective(model)
    torch.testing.assert_close(changed.loss(model, batch), changed.loss(model, batch, full_logits=True))
    model, objective = objective_of(tiny_model)
    with torch.autocast("cpu", torch.bfloat16):
        objective.loss(model, batch).backward()
    assert model.lm_head.weight.grad is not None
    assert calls == []


def test_a_micro_batch_without_examples_has_a_gradient_of_zero(tiny_model: Path, calls: list[int]) -> None:
    """A rank without examples runs the same backward pass as the others."""
    batch = batch_of([FIRST])
    nothing = batch._replace(index=batch.index[:0], targets=batch.targets[:0])
    model, objective = objective_of(tiny_model)
    loss = objective.loss(model, nothing)
    loss.backward()
    assert float(loss.detach()) == 0
    assert model.lm_head.weight.grad is not None
    assert float(model.lm_head.weight.grad.abs().max()) == 0
    assert len(calls) == 1
