"""Code is recognized by the formula that it computes in fp32, and only where the kernel rounds no more often in
bf16."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional

from finetune_trainer.kernels.gated_product import Activation
from finetune_trainer.kernels.recognition import Misfit, gate_activation, norm_form, why_not_turned
from finetune_trainer.kernels.rms_norm import Form

Rotate = Callable[..., tuple[torch.Tensor, torch.Tensor]]


def swapped(x: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


def rotate_as_llama(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, unsqueeze_dim: int = 1
) -> tuple[torch.Tensor, torch.Tensor]:
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    return (q * cos) + (swapped(q) * sin), (k * cos) + (swapped(k) * sin)


def rotate_in_fp32(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """As in the code of ModernBERT."""
    query, key = rotate_as_llama(q.float(), k.float(), cos, sin)
    return query.to(q.dtype), key.to(k.dtype)


def rotate_neighbours(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    def turned(x: torch.Tensor) -> torch.Tensor:
        other = torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)
        return x * cos.unsqueeze(1) + other * sin.unsqueeze(1)

    return turned(q), turned(k)


def refuse(*_: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    raise AssertionError("only on a GPU")


@pytest.mark.parametrize(
    ("rotate", "misfit"),
    [
        (rotate_as_llama, None),
        (rotate_in_fp32, Misfit.ROUNDING),
        (rotate_neighbours, Misfit.FORMULA),
        (refuse, Misfit.FORMULA),
    ],
)
def test_a_rotation_is_replaced_where_the_kernel_is_as_exact(rotate: Rotate, misfit: Misfit | None) -> None:
    assert why_not_turned(rotate) is misfit


class Norm(nn.Module):  # type: ignore[misc]  # torch has no types here
    def __init__(self, *, centered: bool = False, rounds: bool = True, features: int = 48) -> None:
        super().__init__()
        self.eps = 1e-5
        self.centered, self.rounds = centered, rounds
        self.weight = nn.Parameter(torch.ones(features))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        if self.rounds:
            wide = wide.to(x.dtype)
        weight = 1 + self.weight.float() if self.centered else self.weight
        return (wide * weight).to(x.dtype)


@pytest.mark.parametrize("features", [24, 48, 8192])
@pytest.mark.parametrize("rounds", [True, False], ids=["rounds twice", "rounds once"])
@pytest.mark.parametrize("centered", [True, False], ids=["1 + w", "w"])
def test_a_norm_is_recognized_however_often_its_code_rounds(centered: bool, rounds: bool, features: int) -> None:
    form = norm_form(Norm(centered=centered, rounds=rounds, features=features))
    assert form is (Form.CENTERED if centered else Form.SCALED)


class InFp32(Norm):
    """A norm that returns fp32."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.float())


class Refusing(Norm):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert x.is_cuda
        return super().forward(x)


def test_a_norm_with_another_precision_or_of_another_device_stays_plain() -> None:
    assert norm_form(InFp32()) is Misfit.ROUNDING
    assert norm_form(Refusing()) is Misfit.FORMULA


class Gated(nn.Module):  # type: ignore[misc]  # torch has no types here
    def __init__(self, *, wide: bool = False, limit: float = 0) -> None:
        super().__init__()
        self.wide, self.limit = wide, limit
        self.gate_proj, self.up_proj, self.down_proj = (nn.Linear(4, 4, bias=False) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.gate_proj(x), self.up_proj(x)
        if self.limit:
            gate = gate.clamp(max=self.limit)
        if self.wide:
            gate, up = gate.float(), up.float()
        result: torch.Tensor = self.down_proj((functional.silu(gate) * up).to(x.dtype))
        return result


def test_a_gated_layer_is_replaced_where_the_kernel_is_as_exact() -> None:
    assert gate_activation(Gated()) is Activation.SILU
    assert gate_activation(Gated(wide=True)) is Misfit.ROUNDING
    assert gate_activation(Gated(limit=7)) is Misfit.FORMULA
