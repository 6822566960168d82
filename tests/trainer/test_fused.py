"""The fused kernels for adapted layers and a frozen head compute the same losses, gradients and logits as peft and
torch, with fewer passes over memory.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft.tuners.lora import Linear
from torch import nn
from torch.nn import functional
from transformers import AutoModelForCausalLM

from finetune_core.api.method import LoRASpec
from finetune_trainer.data.batches import IGNORED
from finetune_trainer.loss.kernels import _AdaptedLinear, frozen_head_loss, fuse_adapters
from finetune_trainer.loss.objective import Objective
from finetune_trainer.model.adapters import add_adapters
from finetune_trainer.model.load import enable_gradient_checkpointing, trained_parameters
from tests.trainer.plain_loop import DENSE
from tests.trainer.test_objective import FIRST, SECOND, OneProcess, batch_of, gradients, model_of


def adapted_model(
    folder: Path, *, dropout: str = "0", recompute: bool = False, dtype: Any = torch.float32, **variant: Any
) -> Any:
    """Return the tiny model with a frozen head, and with non-zero adapters on its dense layers."""
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa")
    base.config.use_cache = False
    if recompute:
        enable_gradient_checkpointing(base)
    lora = LoRASpec.model_validate({"rank": 4, "alpha": 8, "dropout": dropout, **variant})
    model = add_adapters(base, lora, targets=DENSE, seed=1, base_name="tiny")
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in trained_parameters(model).values():
            parameter.copy_(torch.empty(parameter.shape).normal_(0, 0.1, generator=generator))
    return model.train()


def uses(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that gets one more entry at each call of the fused layer."""
    counted: list[int] = []
    apply = _AdaptedLinear.apply

    def counting(*inputs: Any) -> Any:
        counted.append(1)
        return apply(*inputs)

    monkeypatch.setattr(_AdaptedLinear, "apply", counting)
    return counted


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
def test_loss_and_gradients_of_adapted_layers_are_those_of_peft(
    recompute: bool, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = batch_of([FIRST], [SECOND])
    plain = OneProcess(adapted_model(tiny_model))
    wanted = gradients(plain, batch)
    model = adapted_model(tiny_model, recompute=recompute)
    engine, counted = OneProcess(model), uses(monkeypatch)
    assert fuse_adapters(model) == 2 * len(DENSE)
    assert float(engine.loss(batch).detach()) == pytest.approx(float(plain.loss(batch).detach()), rel=1e-6)
    for name, gradient in gradients(engine, batch).items():
        assert gradient.abs().sum() > 0, name
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-4, atol=1e-6, msg=name)
    assert len(counted) >= 4 * len(DENSE)


@pytest.mark.parametrize(("variant", "fused"), [({"rsLoRA": True}, 2 * len(DENSE)), ({"doRA": True}, 0)])
def test_a_layer_is_fused_only_where_the_kernel_computes_all_that_peft_computes(
    variant: dict[str, Any], fused: int, tiny_model: Path
) -> None:
    batch = batch_of([FIRST], [SECOND])
    wanted = gradients(OneProcess(adapted_model(tiny_model, **variant)), batch)
    model = adapted_model(tiny_model, **variant)
    assert fuse_adapters(model) == fused
    for name, gradient in gradients(OneProcess(model), batch).items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-4, atol=1e-6, msg=name)


def test_an_adapted_head_still_turns_logits_into_the_loss(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`fuse_adapters` and the objective, which computes the loss, both replace the forward function of the head.

    The engine calls `fuse_adapters` first, and so does this test.
    """
    batch = batch_of([FIRST], [SECOND])
    wanted = gradients(OneProcess(model_of(tiny_model)), batch)
    model = model_of(tiny_model)
    fuse_adapters(model)
    engine, counted = OneProcess(model), uses(monkeypatch)
    assert engine.loss(batch).shape == ()
    for name, gradient in gradients(engine, batch).items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-4, atol=1e-6, msg=name)
    assert counted


def test_what_is_scored_and_exported_stays_bit_for_bit_what_peft_computes(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, model = adapted_model(tiny_model), adapted_model(tiny_model)
    fuse_adapters(model)
    counted, ids = uses(monkeypatch), torch.tensor([FIRST.ids])
    with torch.no_grad():
        assert torch.equal(model(ids).logits, plain(ids).logits)
    assert torch.equal(model.eval()(ids).logits, plain.eval()(ids).logits)
    assert counted == []


def test_dropout_bf16_and_bias_are_computed_too(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    batch, counted = batch_of([FIRST], [SECOND]), uses(monkeypatch)
    plain, model = (adapted_model(tiny_model, dropout="0.3") for _ in range(2))
    fuse_adapters(model)
    assert torch.equal(OneProcess(model).loss(batch), OneProcess(plain).loss(batch))
    # Layers with active dropout compute as in peft: dropout acts between the input x and the matrix A.
    assert counted == []

    half = adapted_model(tiny_model, dtype=torch.bfloat16)
    fuse_adapters(half)
    assert float(OneProcess(half).loss(batch).detach()) == pytest.approx(
        float(OneProcess(adapted_model(tiny_model)).loss(batch).detach()), rel=2e-2
    )
    assert counted

    layer = next(module for module in half.modules() if isinstance(module, Linear))
    x, weight, a, b = (torch.randn(shape, dtype=torch.float64) for shape in ((3, 5, 6), (7, 6), (2, 6), (7, 2)))
    bias = torch.randn(7, dtype=torch.float64)
    for tensor in (x, a, b):
        tensor.requires_grad_()
    assert torch.autograd.gradcheck(lambda x, a, b: _AdaptedLinear.apply(x, weight, bias, a, b, 0.5), (x, a, b))
    torch.testing.assert_close(
        _AdaptedLinear.apply(x, weight, bias, a, b, 0.5), functional.linear(x, weight, bias) + 0.5 * (x @ a.T @ b.T)
    )
    assert not layer.base_layer.weight.requires_grad


@pytest.mark.parametrize("chunk_rows", [1, 3, 100])
def test_loss_and_gradient_under_a_frozen_head_are_those_of_cross_entropy(chunk_rows: int) -> None:
    torch.manual_seed(0)
    head = nn.Linear(6, 11).requires_grad_(False)
    hidden, targets = torch.randn(8, 6), torch.tensor([1, 5, IGNORED, 0, 10, 7, IGNORED, 2])
    for excluded in (None, torch.tensor([3, 9])):
        wanted, found = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
        logits = head(wanted)
        if excluded is not None:
            logits = logits.index_fill(1, excluded, float("-inf"))
        expected = functional.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum")
        (2.5 * expected).backward()
        loss = frozen_head_loss(found, head, targets, excluded=excluded, chunk_rows=chunk_rows)
        (2.5 * loss).backward()
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(found.grad, wanted.grad)


def test_a_head_that_is_trained_or_adapted_keeps_autograd(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from finetune_trainer.loss import head as module

    called: list[int] = []

    def counting(*arguments: Any, **options: Any) -> Any:
        called.append(1)
        return frozen_head_loss(*arguments, **options)

    monkeypatch.setattr(module, "frozen_head_loss", counting)
    batch = batch_of([FIRST], [SECOND])
    full = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).train()
    Objective(full).loss(full, batch).backward()
    assert full.lm_head.weight.grad is not None
    assert called == []
    adapted = adapted_model(tiny_model)
    frozen = OneProcess(adapted)
    wanted = frozen.loss(batch, full_logits=True)
    torch.testing.assert_close(frozen.loss(batch), wanted)
    assert len(called) == 1
