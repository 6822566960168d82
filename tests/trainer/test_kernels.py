"""Each kernel of the room `kernels` computes the values and the gradients of its plain form, and keeps little
more than its inputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from finetune_trainer.kernels.dropped_product import Dropout
from finetune_trainer.kernels.gated_product import Activation, activate, gated_product
from finetune_trainer.kernels.projections import Projection, project, project_gated
from finetune_trainer.kernels.rms_norm import Form, plain_rms_norm, rms_norm
from finetune_trainer.kernels.rotary import (
    alias,
    plain_rotation,
    plain_rotations,
    rotate_queries_and_keys,
    side_by_side,
)
from finetune_trainer.kernels.trials import rounds_no_more
from finetune_trainer.loss.dropout import keep_mask

Compute = Callable[..., Sequence[torch.Tensor]]


def numbers(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype).requires_grad_()


def compare(fused: Compute, plain: Compute, inputs: Sequence[torch.Tensor], *, bound: float = 1e-6) -> None:
    """Compare outputs and all gradients of two functions of ``inputs``, element by element. ``bound`` is relative to
    the largest number of a tensor. The plain function computes in fp64, so that its own rounding is no part of the
    difference."""
    copies = [tensor.detach().double().requires_grad_(tensor.requires_grad) for tensor in inputs]
    found, wanted = fused(*inputs), plain(*copies)
    for number, (ours, theirs) in enumerate(zip(found, wanted, strict=True)):
        assert ours.dtype == inputs[0].dtype
        assert_near(ours, theirs, bound)
        weights = torch.randn(theirs.shape, generator=torch.Generator().manual_seed(number)).to(ours.dtype)
        ours.backward(weights, retain_graph=True)
        theirs.backward(weights.double(), retain_graph=True)
    for tensor, copied in zip(inputs, copies, strict=True):
        assert (tensor.grad is None) == (copied.grad is None)
        if tensor.grad is not None and copied.grad is not None:
            assert_near(tensor.grad, copied.grad, bound)


def assert_near(found: torch.Tensor, wanted: torch.Tensor, bound: float) -> None:
    assert found.shape == wanted.shape
    assert float((found.double() - wanted).detach().abs().max()) <= bound * float(wanted.detach().abs().max())


def bytes_kept(compute: Callable[[], object]) -> int:
    """Return the bytes of the tensors that autograd keeps, each memory counted once."""
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = compute()
    assert result is not None
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("form", list(Form), ids=lambda form: form.name)
def test_a_norm_is_its_formula(form: Form, dtype: torch.dtype) -> None:
    x = numbers(3, 5, 48, seed=1, dtype=dtype)
    if form is Form.BARE:
        compare(
            lambda x: [rms_norm(x, None, 1e-3, form)],
            lambda x: [plain_rms_norm(x, None, 1e-3, form)],
            [x],
            bound=1e-6 if dtype == torch.float32 else 2**-7,
        )
        return
    compare(
        lambda x, weight: [rms_norm(x, weight, 1e-3, form)],
        lambda x, weight: [plain_rms_norm(x, weight, 1e-3, form)],
        [x, numbers(48, seed=2, dtype=dtype)],
        bound=1e-6 if dtype == torch.float32 else 2**-7,
    )


def test_a_norm_with_a_frozen_weight_passes_the_gradient_of_its_input_on() -> None:
    for form in (Form.SCALED, Form.CENTERED):
        weight = numbers(48, seed=2).detach()
        compare(
            lambda x, form=form, weight=weight: [rms_norm(x, weight, 1e-6, form)],
            lambda x, form=form, weight=weight: [plain_rms_norm(x, weight.double(), 1e-6, form)],
            [numbers(3, 5, 48, seed=1)],
        )


def test_a_norm_keeps_its_input_and_one_number_a_token() -> None:
    x, weight = numbers(3, 5, 48, seed=1), numbers(48, seed=2)
    assert bytes_kept(lambda: rms_norm(x, weight, 1e-6, Form.SCALED)) == 4 * (3 * 5 * 48 + 48 + 3 * 5)


@pytest.mark.parametrize("joined", [False, True], ids=["apart", "side by side"])
@pytest.mark.parametrize("size", [8, 4], ids=["all features", "half of the features"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_queries_and_keys_are_turned_as_by_the_formula(joined: bool, size: int, dtype: torch.dtype) -> None:
    cosine, sine = (numbers(2, 1, 5, size, seed=seed, dtype=dtype).detach() for seed in (3, 4))

    def turn(states: torch.Tensor) -> list[torch.Tensor]:
        # As in the code of a model: the heads of a token side by side, queries before keys.
        parts = states.split([24, 8], dim=-1)
        if joined:
            parts = tuple(_Aliases.apply(states))
        query, key = (part.view(2, 5, -1, 8).transpose(1, 2) for part in parts)
        assert (side_by_side(query, key) is not None) or not joined
        return list(rotate_queries_and_keys(query, key, cosine, sine))

    def plain(states: torch.Tensor) -> list[torch.Tensor]:
        query, key = (part.view(2, 5, -1, 8).transpose(1, 2) for part in states.split([24, 8], dim=-1))
        return [plain_rotation(x, cosine.double(), sine.double()) for x in (query, key)]

    bound = 1e-6 if dtype == torch.float32 else 2**-7
    compare(turn, plain, [numbers(2, 5, 32, seed=5, dtype=dtype)], bound=bound)


class _Aliases(torch.autograd.Function):  # type: ignore[misc]  # torch has no types here
    """Two tensors over the memory of one, as `project` returns them."""

    @staticmethod
    def forward(_ctx: object, states: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(alias(part) for part in states.clone().split([24, 8], dim=-1))

    @staticmethod
    def backward(_ctx: object, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return torch.cat((query, key), dim=-1)


@pytest.mark.parametrize("activation", list(Activation), ids=lambda activation: activation.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_gated_product_is_its_formula_and_keeps_its_inputs(activation: Activation, dtype: torch.dtype) -> None:
    gate, up = (numbers(3, 5, 16, seed=seed, dtype=dtype) for seed in (6, 7))
    compare(
        lambda gate, up: [gated_product(gate, up, activation)],
        lambda gate, up: [activate(gate, activation) * up],
        [gate, up],
        bound=1e-6 if dtype == torch.float32 else 2**-6,
    )
    assert bytes_kept(lambda: gated_product(gate, up, activation)) == 2 * gate.nbytes


KEYS = torch.randint(-(1 << 62), 1 << 62, (3, 5), generator=torch.Generator().manual_seed(8))
SALTS = (11, -(1 << 50), 77)
SIZES = (12, 6, 9)
"""Outputs of three layers that share an input of 16 features."""


def layers_of(tensors: Sequence[torch.Tensor], *, adapted: Sequence[int]) -> list[Projection]:
    """Return the layers whose weights, biases, A and B are in ``tensors``. Layers that are not ``adapted`` have no
    adapter."""
    layers = []
    for number in range(len(tensors) // 4):
        weight, bias, a, b = tensors[4 * number : 4 * number + 4]
        has = number in adapted
        layers.append(
            Projection(weight, bias if number else None, a if has else None, b if has else None, 1.5 - number)
        )
    return layers


def tensors_of(sizes: Sequence[int], *, trained: bool) -> list[torch.Tensor]:
    """Return weight, bias, A and B for each of ``sizes`` outputs. The ranks differ."""
    found = []
    for number, size in enumerate(sizes):
        shapes = ((size, 16), (size,), (2 + number, 16), (size, 2 + number))
        tensors = [numbers(*shape, seed=10 * number + place) for place, shape in enumerate(shapes)]
        found += [tensor if trained or place >= 2 else tensor.detach() for place, tensor in enumerate(tensors)]
    return found


def plain_outputs(
    x: torch.Tensor, layers: Sequence[Projection], *, p: float, adapted: Sequence[int]
) -> list[torch.Tensor]:
    salts = iter(SALTS)
    outputs = []
    for layer in layers:
        output = functional.linear(x, layer.weight, layer.bias)
        if layer.a is not None and layer.b is not None:
            kept = keep_mask(KEYS ^ next(salts), 16, p).double() / (1 - p) if p else 1
            output = output + layer.scaling * (x * kept) @ layer.a.T @ layer.b.T
        outputs.append(output)
    assert len(adapted) <= len(layers)
    return outputs


def dropout_of(p: float, adapted: Sequence[int]) -> Dropout | None:
    ranks = tuple(2 + number for number in adapted)
    return Dropout(KEYS.flatten(), p, SALTS[: len(adapted)], ranks) if p and adapted else None


@pytest.mark.parametrize("p", [0.0, 0.4], ids=["no dropout", "dropout"])
@pytest.mark.parametrize("joined", [False, True], ids=["apart", "side by side"])
@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
@pytest.mark.parametrize("adapted", [(0, 1, 2), (0, 2), (1,), ()], ids=str)
def test_layers_that_share_an_input_compute_what_each_computes_alone(
    p: float, joined: bool, trained: bool, adapted: tuple[int, ...]
) -> None:
    def fused(x: torch.Tensor, *tensors: torch.Tensor) -> list[torch.Tensor]:
        return project(x, layers_of(tensors, adapted=adapted), dropout_of(p, adapted), joined=joined)

    def plain(x: torch.Tensor, *tensors: torch.Tensor) -> list[torch.Tensor]:
        return plain_outputs(x, layers_of(tensors, adapted=adapted), p=p, adapted=adapted)

    compare(fused, plain, [numbers(3, 5, 16, seed=99), *tensors_of(SIZES, trained=trained)])


@pytest.mark.parametrize("p", [0.0, 0.4], ids=["no dropout", "dropout"])
@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
@pytest.mark.parametrize("adapted", [(0,), ()], ids=str)
@pytest.mark.parametrize("activation", list(Activation), ids=lambda activation: activation.name)
def test_a_gated_projection_computes_product_and_layer_without_keeping_the_product(
    p: float, trained: bool, adapted: tuple[int, ...], activation: Activation
) -> None:
    def fused(gate: torch.Tensor, up: torch.Tensor, *tensors: torch.Tensor) -> list[torch.Tensor]:
        layer = layers_of(tensors, adapted=adapted)[0]
        return [project_gated(gate, up, activation, layer, dropout_of(p, adapted))]

    def plain(gate: torch.Tensor, up: torch.Tensor, *tensors: torch.Tensor) -> list[torch.Tensor]:
        layers = layers_of(tensors, adapted=adapted)
        return plain_outputs(activate(gate, activation) * up, layers, p=p, adapted=adapted)

    gate, up = numbers(3, 5, 16, seed=97), numbers(3, 5, 16, seed=98)
    tensors = tensors_of(SIZES[:1], trained=trained)
    compare(fused, plain, [gate, up, *tensors])
    parameters = sum(tensor.nbytes for tensor in tensors) - tensors[1].nbytes
    inner = 4 * 15 * 2 if adapted else 0
    assert bytes_kept(lambda: fused(gate, up, *tensors)) <= 2 * gate.nbytes + inner + parameters


def test_a_projection_in_bf16_is_right_within_rounding() -> None:
    tensors = [
        numbers(*shape, seed=seed, dtype=torch.bfloat16) for seed, shape in enumerate([(12, 16), (2, 16), (12, 2)])
    ]
    compare(
        lambda x, weight, a, b: project(x, [Projection(weight, None, a, b, 2.0)]),
        lambda x, weight, a, b: [functional.linear(x, weight) + 2 * x @ a.T @ b.T],
        [numbers(3, 5, 16, seed=99, dtype=torch.bfloat16), *tensors],
        bound=2**-6,
    )


def test_outputs_may_be_changed_in_place() -> None:
    """Some models clamp queries and keys in place, which torch refuses for views of what a function returned."""
    tensors = tensors_of(SIZES, trained=False)
    x = numbers(3, 5, 16, seed=99)
    query, key, _ = project(x, layers_of(tensors, adapted=(0, 1, 2)), joined=True)
    query.clamp_(min=-0.1)
    key.clamp_(max=0.125)
    assert float(key.detach().max()) <= 0.125 < float(query.detach().max())
    (query.sum() + key.sum()).backward()
    assert x.grad is not None


def frozen_except(*trained: int) -> list[torch.Tensor]:
    """Return the tensors of three layers, of which only those at the places ``trained`` of each layer are trained."""
    tensors = tensors_of(SIZES, trained=True)
    return [tensor if place % 4 in trained else tensor.detach() for place, tensor in enumerate(tensors)]


@pytest.mark.parametrize(
    ("adapted", "trained", "kept"),
    [((), (), 0), ((), (1,), 0), ((0, 1, 2), (3,), 15 * (2 + 3 + 4)), ((0, 1, 2), (2,), 15 * 16), ((), (0,), 15 * 16)],
    ids=["frozen", "biases", "matrices B", "matrices A", "weights"],
)
def test_layers_keep_only_what_the_gradients_that_are_wanted_need(
    adapted: tuple[int, ...], trained: tuple[int, ...], kept: int
) -> None:
    """A frozen layer of torch keeps nothing of its input. Weights are in memory anyway."""
    x, tensors = numbers(3, 5, 16, seed=99), frozen_except(*trained)
    layers = layers_of(tensors, adapted=adapted)
    own = {tensor.untyped_storage()._cdata for tensor in tensors}
    extra = 4 * (2 + 3 + 4) * 16 if adapted else 0  # All matrices A side by side.
    bytes_of_weights = sum(
        tensor.untyped_storage().nbytes()
        for layer in layers
        for tensor in layer[:4]
        if tensor is not None and tensor.untyped_storage()._cdata in own
    )
    assert bytes_kept(lambda: project(x, layers, joined=True)) == 4 * kept + extra + bytes_of_weights
    compare(
        lambda x, *tensors: project(x, layers_of(tensors, adapted=adapted)),
        lambda x, *tensors: plain_outputs(x, layers_of(tensors, adapted=adapted), p=0, adapted=adapted),
        [x, *tensors],
    )


def test_an_output_that_nobody_uses_gives_no_gradients() -> None:
    """torch gives none either. An optimizer with weight decay would apply zeros."""
    x, tensors = numbers(3, 5, 16, seed=99), tensors_of(SIZES, trained=True)
    first, _, third = project(x, layers_of(tensors, adapted=(0, 1, 2)))
    copies = [tensor.detach().clone().requires_grad_() for tensor in (x, *tensors)]
    plain = plain_outputs(copies[0], layers_of(copies[1:], adapted=(0, 1, 2)), p=0, adapted=(0, 1, 2))
    (first.sum() + third.square().sum()).backward()
    (plain[0].sum() + plain[2].square().sum()).backward()
    for tensor, copied in zip((x, *tensors), copies, strict=True):
        assert (tensor.grad is None) == (copied.grad is None)
        if tensor.grad is not None and copied.grad is not None:
            torch.testing.assert_close(tensor.grad, copied.grad, rtol=1e-5, atol=1e-5)
    assert tensors[4].grad is None
    query, key = numbers(2, 3, 5, 8, seed=1), numbers(2, 1, 5, 8, seed=2)
    cosine, sine = (numbers(2, 1, 5, 8, seed=seed).detach() for seed in (3, 4))
    rotate_queries_and_keys(query, key, cosine, sine)[1].sum().backward()
    assert query.grad is None
    assert key.grad is not None


class WithoutGradient(torch.autograd.Function):  # type: ignore[misc]  # torch has no types here
    """A function of a model that gives its input no gradient, although the input wants one."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> None:
        return None


@pytest.mark.parametrize("p", [0.0, 0.4])
def test_outputs_of_which_none_gets_a_gradient_give_none(p: float) -> None:
    x, tensors = numbers(3, 5, 16, seed=98), tensors_of(SIZES, trained=True)
    outputs = project(x, layers_of(tensors, adapted=(0, 1, 2)), dropout_of(p, (0, 1, 2)))
    (x.sum() + sum(WithoutGradient.apply(output).sum() for output in outputs)).backward()
    assert x.grad is not None
    assert torch.equal(x.grad, torch.ones_like(x))
    assert [tensor.grad for tensor in tensors] == [None] * len(tensors)


def test_tensors_with_other_features_do_not_lie_side_by_side() -> None:
    memory = torch.arange(2.0 * 5 * 4 * 8).view(2, 5, 4, 8).transpose(1, 2)
    assert side_by_side(memory[:, :3], memory[:, 3:]) is not None
    assert side_by_side(memory[:, :3], memory[:, 3:, :, :4]) is None
    assert side_by_side(memory[:, :3, :4], memory[:, 3:]) is None


@pytest.mark.parametrize("form", list(Form), ids=lambda form: form.name)
def test_a_norm_in_bf16_is_rounded_once(form: Form) -> None:
    """As in the code of the models, which computes in fp32. Twice would be 1.4 times the error."""
    inputs = [numbers(64, 128, seed=1), *([numbers(128, seed=2)] if form is not Form.BARE else [])]
    assert rounds_no_more(
        lambda x, weight=None: rms_norm(x, weight, 1e-6, form),
        lambda x, weight=None: plain_rms_norm(x, weight, 1e-6, form),
        lambda x, weight=None: plain_rms_norm(x, weight, 1e-6, form),
        inputs,
    )


def test_gradients_of_gradients_are_refused() -> None:
    """The backward passes compute without autograd."""
    x, tensors = numbers(3, 5, 16, seed=99), tensors_of(SIZES, trained=True)
    layers = layers_of(tensors, adapted=(0, 1, 2))
    cosine, sine = (numbers(1, 1, 5, 16, seed=seed).detach() for seed in (3, 4))
    for output in (
        rms_norm(x, None, 1e-6, Form.BARE),
        gated_product(x, x, Activation.SILU),
        project(x, layers)[0],
        project_gated(x, x, Activation.SILU, layers[0]),
        rotate_queries_and_keys(x.unsqueeze(1), x.unsqueeze(1), cosine, sine)[0],
    ):
        (gradient,) = torch.autograd.grad(output.square().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            gradient.sum().backward()


@pytest.mark.parametrize("features", [16, 64])
def test_rotary_embeddings_have_in_fp32_the_bits_of_the_code_of_models(features: int) -> None:
    generator = torch.Generator().manual_seed(3)
    states = [torch.randn((2, 11, heads, features), generator=generator) for heads in (4, 2)]
    weights = [torch.randn((2, heads, 11, features), generator=generator) for heads in (4, 2)]
    cosine, sine = (torch.randn((2, 1, 11, features // 2), generator=generator).repeat(1, 1, 1, 2) for _ in range(2))
    results = []
    for rotate in (rotate_queries_and_keys, plain_rotations):
        leaves = [tensor.clone().requires_grad_() for tensor in states]
        query, key = (leaf.transpose(1, 2) for leaf in leaves)
        outputs = rotate(query, key, cosine, sine)
        results.append([*outputs, *torch.autograd.grad(outputs, leaves, weights)])
    for found, wanted in zip(*results, strict=True):
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("shape", [(4, 7, 64), (2, 33, 576), (3, 5, 8, 128)], ids=str)
@pytest.mark.parametrize(("kind", "form"), [(LlamaRMSNorm, Form.SCALED), (GemmaRMSNorm, Form.CENTERED)])
def test_a_norm_has_in_fp32_on_the_cpu_the_bits_of_the_code_of_models(
    kind: type[nn.Module], form: Form, shape: tuple[int, ...]
) -> None:
    generator = torch.Generator().manual_seed(4)
    x, weights = (torch.randn(shape, generator=generator) for _ in range(2))
    module: Any = kind(shape[-1], eps=1e-6)
    weight = torch.rand(shape[-1], generator=generator)
    module.weight.data.copy_(weight)
    wanted, found = (x.clone().requires_grad_() for _ in range(2))
    own = weight.clone().requires_grad_()
    outputs = module(wanted), rms_norm(found, own, 1e-6, form)
    gradients = [
        torch.autograd.grad(output, leaves, weights)
        for output, leaves in zip(outputs, ((wanted, module.weight), (found, own)), strict=True)
    ]
    for one, other in zip((outputs[0], *gradients[0]), (outputs[1], *gradients[1]), strict=True):
        assert torch.equal(one, other)
