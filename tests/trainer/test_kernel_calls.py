"""A model with fused kernels stays a model of transformers and peft: what a call of a module runs is run, adapters can
be merged and switched off, exceptions leave nothing behind, and the training's random numbers stay the same."""

from __future__ import annotations

import copy
import gc
import weakref
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import nn
from torch.utils.checkpoint import checkpoint

from finetune_trainer.kernels.install import use_fused_kernels
from finetune_trainer.kernels.parts import KernelPart
from finetune_trainer.model.load import trained_parameters
from finetune_trainer.model.packed_attention import note_borders
from tests.trainer.families import write_family
from tests.trainer.fused_families import NEAR, batches, engine_of, gradients_of, nodes_of, trained_model
from tests.trainer.test_objective import FIRST, SECOND, OneProcess, batch_of, gradients, model_of

Change = Callable[[Any], object]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_family("llama-3", tmp_path_factory.mktemp("calls") / "model")


@pytest.fixture
def plain(folder: Path) -> Any:
    return trained_model(folder, lora=True)


@pytest.fixture
def fused(folder: Path) -> Any:
    model = trained_model(folder, lora=True)
    assert use_fused_kernels(model).replaced
    return model


def compute(model: Any) -> torch.Tensor:
    """Return the logits of a micro-batch as they are computed in training."""
    note_borders(None)
    logits: torch.Tensor = model(input_ids=batches(packed=False).input_ids, use_cache=False).logits
    return logits


def assert_same(fused: Any, plain: Any) -> None:
    """Compare logits and gradients of two models with the same weights."""
    found, wanted = compute(fused), compute(plain)
    assert float((found - wanted).detach().abs().max()) <= NEAR * float(wanted.detach().abs().max())
    for logits in (found, wanted):
        if logits.requires_grad:
            logits.square().sum().backward()
    theirs = dict(plain.named_parameters())
    for name, parameter in fused.named_parameters():
        expected = theirs[name].grad
        assert (parameter.grad is None) == (expected is None), name
        if expected is not None:
            away = float((parameter.grad - expected).abs().max())
            assert away <= 4 * NEAR * float(expected.abs().max()), name
    for model in (fused, plain):
        model.zero_grad()


def named(model: nn.Module, end: str) -> list[nn.Module]:
    found = [module for name, module in model.named_modules() if name.endswith(end)]
    assert found, end
    return found


MODULES = ("down_proj", "k_proj", "q_proj.base_layer", "lora_A.default", "lora_B.default", "act_fn", "mlp", "norm")


@pytest.mark.parametrize("end", MODULES)
@pytest.mark.parametrize("kind", ["forward", "before", "backward"])
def test_hooks_are_run_as_often_as_in_the_plain_model(end: str, kind: str, fused: Any, plain: Any) -> None:
    counted = {}
    for model in (fused, plain):
        calls = counted[model] = Counter[str]()

        def note(module: nn.Module, *_: Any, calls: Counter[str] = calls) -> None:
            calls[type(module).__name__] += 1

        for module in named(model, end):
            if kind == "forward":
                module.register_forward_hook(note)
            elif kind == "before":
                module.register_forward_pre_hook(note)
            else:
                module.register_full_backward_hook(note)
    assert_same(fused, plain)
    assert counted[fused] == counted[plain]
    assert counted[plain].total() > 0


def test_a_hook_for_all_modules_of_the_process_sees_every_call(fused: Any, plain: Any) -> None:
    counted = []
    for model in (fused, plain):
        calls: Counter[str] = Counter()
        handle = nn.modules.module.register_module_forward_hook(
            lambda module, *_, calls=calls: calls.update([type(module).__name__])
        )
        try:
            compute(model)
        finally:
            handle.remove()
        counted.append(calls)
    assert counted[0] == counted[1]


@pytest.mark.parametrize("end", ["down_proj", "gate_proj", "q_proj.base_layer", "lora_A.default", "act_fn", "norm"])
@pytest.mark.parametrize("early", [True, False], ids=["before", "after"])
def test_a_forward_function_that_somebody_replaced_is_called(end: str, early: bool, folder: Path, plain: Any) -> None:
    fused = trained_model(folder, lora=True)
    if not early:
        use_fused_kernels(fused)
    for model in (fused, plain):
        for module in named(model, end):
            module.forward = partial(lambda own, *inputs: 1.5 * own(*inputs), module.forward)
    if early:
        use_fused_kernels(fused)
    assert_same(fused, plain)


def add_other(model: Any, *, active: Any) -> None:
    model.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=True))
    generator = torch.Generator().manual_seed(4)
    for name, parameter in model.named_parameters():
        if ".other." in name:
            parameter.data.copy_(torch.empty(parameter.shape).normal_(0, 0.1, generator=generator))
    model.base_model.set_adapter(active)


CHANGES: dict[str, Change] = {
    "switched off": lambda model: model.disable_adapter_layers(),
    "switched off and on": lambda model: (model.disable_adapter_layers(), model.enable_adapter_layers()),
    "merged": lambda model: model.merge_adapter(),
    "merged and not": lambda model: (model.merge_adapter(), model.unmerge_adapter()),
    "another one": partial(add_other, active="other"),
    "two": partial(add_other, active=["default", "other"]),
    "taken away": lambda model: model.base_model.unload(),
    "merged for ever": lambda model: model.base_model.merge_and_unload(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_adapters_can_be_changed_as_in_the_plain_model(change: str, fused: Any, plain: Any) -> None:
    assert_same(fused, plain)
    for model in (fused, plain):
        CHANGES[change](model)
        model.train()
    assert_same(fused, plain)


def test_the_random_numbers_of_the_training_stay_the_same(folder: Path) -> None:
    model = trained_model(folder, lora=True)
    before = torch.get_rng_state()
    use_fused_kernels(model)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_model_that_can_not_compute_two_tokens_is_fused_without_groups(folder: Path, plain: Any) -> None:
    model = trained_model(folder, lora=True)

    def demand(_module: nn.Module, _inputs: Any, options: dict[str, Any]) -> None:
        if options["input_ids"].shape[1] == 2:
            raise KeyError("pixel_values")

    model.get_base_model().register_forward_pre_hook(demand, with_kwargs=True)
    report = use_fused_kernels(model)
    assert report.replaced[KernelPart.PROJECTIONS] == 2 * 7
    (left,) = report.left
    assert left.part is KernelPart.PROJECTIONS
    assert left.module == "LlamaForCausalLM"
    assert "pixel_values" in left.reason
    assert model.training
    assert_same(model, plain)


def test_memory_that_is_missing_for_two_tokens_ends_the_job(folder: Path) -> None:
    model = trained_model(folder, lora=True)

    def fail(*_: Any) -> None:
        raise torch.OutOfMemoryError

    handle = model.get_base_model().register_forward_pre_hook(fail)
    with pytest.raises(torch.OutOfMemoryError):
        use_fused_kernels(model)
    handle.remove()


def test_an_exception_leaves_no_outputs_behind(fused: Any, plain: Any) -> None:
    seen: list[weakref.ref[torch.Tensor]] = []

    def fail(_module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        seen.append(weakref.ref(inputs[0]))
        raise ValueError

    handles = [module.register_forward_pre_hook(fail) for module in named(fused, "v_proj")]
    with pytest.raises(ValueError):
        compute(fused)
    gc.collect()
    assert seen[0]() is None
    for handle in handles:
        handle.remove()
    assert_same(fused, plain)


class Pair(nn.Module):  # type: ignore[misc]  # torch has no types here
    """A model with two frozen layers that read the same tensor, which the model may change in place in between."""

    def __init__(self) -> None:
        super().__init__()
        self.changes = False
        torch.manual_seed(5)
        self.embedding = nn.Embedding(64, 8)
        self.first, self.second = (nn.Linear(8, 8).requires_grad_(False) for _ in range(2))

    def get_output_embeddings(self) -> None:
        return None

    def forward(self, input_ids: torch.Tensor, use_cache: bool = False) -> torch.Tensor:
        assert not use_cache
        x = self.embedding(input_ids) * 1
        first = self.first(x)
        if self.changes:
            x.mul_(2)
        result: torch.Tensor = first + self.second(x)
        return result


@pytest.mark.parametrize("changes", [False, True])
def test_an_input_that_was_changed_in_place_is_another_input(changes: bool) -> None:
    plain, fused = Pair(), Pair()
    assert use_fused_kernels(fused).replaced == {KernelPart.PROJECTIONS: 2}
    results = []
    for model in (fused, plain):
        model.changes = changes
        model(torch.arange(5).view(1, 5)).square().sum().backward()
        results.append([model(torch.arange(5).view(1, 5)), model.embedding.weight.grad])
    for found, wanted in zip(*results, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)


class Heads(nn.Module):  # type: ignore[misc]  # torch has no types here
    """A model that cuts queries and keys into heads with `view`, and turns neither."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.embedding = nn.Embedding(64, 8)
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(8, 8) for _ in range(3))

    def get_output_embeddings(self) -> None:
        return None

    def forward(self, input_ids: torch.Tensor, use_cache: bool = False) -> torch.Tensor:
        assert not use_cache
        x = self.embedding(input_ids) * 1
        query, key = (layer(x).view(-1, 4) for layer in (self.q_proj, self.k_proj))
        result: torch.Tensor = (query * key).view(x.shape) + self.v_proj(x)
        return result


def test_outputs_lie_in_one_piece_where_the_kernel_does_not_turn_them() -> None:
    plain, fused = Heads(), Heads()
    assert use_fused_kernels(fused).replaced == {KernelPart.PROJECTIONS: 3}
    results = []
    for model in (fused, plain):
        model(torch.arange(10).view(2, 5)).square().sum().backward()
        results.append([parameter.grad for parameter in model.parameters()])
    for found, wanted in zip(*results, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("plain_parts", [(), (KernelPart.ROTARY,)], ids=["turned", "not turned"])
def test_only_queries_and_keys_that_the_kernel_turns_lie_side_by_side(
    plain_parts: tuple[KernelPart, ...], folder: Path
) -> None:
    model = trained_model(folder, lora=True)
    use_fused_kernels(model, plain=plain_parts)
    x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(6))
    outputs = {end: named(model, end)[0](x) for end in ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")}
    apart = {end for end, output in outputs.items() if not output.is_contiguous()}
    assert apart == (set() if plain_parts else {"q_proj", "k_proj"})


class Dropping(nn.Module):  # type: ignore[misc]  # torch has no types here
    """A gated layer that drops features in training."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = (nn.Linear(8, 8, bias=False) for _ in range(3))
        self.dropout = nn.Dropout(p)

    def get_output_embeddings(self) -> None:
        return None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.down_proj(self.dropout(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x)))
        return result


class OwnType(nn.Linear):  # type: ignore[misc]  # torch has no types here
    """A linear layer that computes in the type of its weight, as layers do that are kept in another type."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = super().forward(x.to(self.weight.dtype))
        return result


def test_gate_and_up_of_different_types_are_multiplied_as_in_the_plain_model() -> None:
    torch.manual_seed(8)
    plain = Dropping(0.0)
    plain.gate_proj, plain.up_proj = (OwnType(8, 8, bias=False) for _ in range(2))
    fused = copy.deepcopy(plain)
    for model in (plain, fused):
        model.gate_proj.bfloat16()
    assert KernelPart.GATED_PRODUCTS in use_fused_kernels(fused, plain=[KernelPart.PROJECTIONS]).replaced
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(9))
    results = []
    for model in (fused, plain):
        output = model(x)
        output.square().sum().backward()
        results.append([output.detach(), *(parameter.grad for parameter in model.parameters())])
    for found, wanted in zip(*results, strict=True):
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_code_is_recognized_by_what_it_computes_in_training(p: float) -> None:
    """A model is in evaluation mode when it was loaded."""
    layer = Dropping(p).eval()
    report = use_fused_kernels(layer, plain=[KernelPart.PROJECTIONS])
    assert (KernelPart.GATED_PRODUCTS in report.replaced) == (p == 0)


def test_a_copy_of_a_model_is_a_model_of_its_own(fused: Any, plain: Any) -> None:
    copied = copy.deepcopy(fused)
    fused.eval()
    with torch.no_grad():
        for parameter in fused.parameters():
            parameter.zero_()
    assert_same(copied, plain)
    copied.eval()
    fused.train()
    assert torch.equal(compute(copied), compute(plain.eval()))


def test_the_names_of_the_weights_stay_the_same(fused: Any, plain: Any) -> None:
    assert list(fused.state_dict()) == list(plain.state_dict())
    assert list(trained_parameters(fused)) == list(trained_parameters(plain))


def test_under_autocast_the_code_of_the_model_computes(fused: Any, plain: Any) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(compute(fused), compute(plain))


def test_a_compiler_sees_the_code_of_the_model(fused: Any, plain: Any) -> None:
    x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(6))
    for end in ("mlp", "input_layernorm"):
        found, wanted = (
            torch.compile(named(model, end)[0], backend="eager", fullgraph=True)(x) for model in (fused, plain)
        )
        torch.testing.assert_close(found, wanted, rtol=0, atol=0)


def test_arguments_may_have_names(fused: Any, plain: Any) -> None:
    x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(6))
    for end, name in (("mlp", "x"), ("input_layernorm", "hidden_states"), ("q_proj", "x"), ("v_proj", "x")):
        found, wanted = (named(model, end)[0](**{name: x}) for model in (fused, plain))
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)


def test_two_forward_passes_before_a_backward_pass_add_up(fused: Any, plain: Any) -> None:
    found = []
    for model in (fused, plain):
        engine = engine_of(model, packed=False)
        losses = [engine.loss(batches(packed=False), full_logits=True) for _ in range(2)]
        (losses[0] + 0.5 * losses[1]).backward()
        found.append({name: value.grad for name, value in trained_parameters(model).items()})
    for name, gradient in found[0].items():
        away = float((gradient - found[1][name]).abs().max())
        assert away <= 4 * NEAR * float(found[1][name].abs().max()), name


def computed_again(own: Any, x: torch.Tensor, *, reentrant: bool, **options: Any) -> Any:
    return checkpoint(lambda states: own(states, **options), x, use_reentrant=reentrant)


@pytest.mark.parametrize("reentrant", [False, True])
def test_layers_can_be_computed_again_in_the_backward_pass(reentrant: bool, fused: Any, plain: Any) -> None:
    for model in (fused, plain):
        model.get_base_model().enable_input_require_grads()
    for layer in fused.get_base_model().model.layers:
        layer.forward = partial(computed_again, layer.forward, reentrant=reentrant)
    batch = batches(packed=False)
    found, wanted = (gradients_of(engine_of(model, packed=False), batch) for model in (fused, plain))
    assert found.keys() == wanted.keys()
    for name, gradient in found.items():
        assert float((gradient - wanted[name]).abs().max()) <= 4 * NEAR * float(wanted[name].abs().max()), name


class Doubled(torch.Tensor):  # type: ignore[misc]  # torch has no types here
    """A tensor with a linear layer of its own, as quantized tensors have."""

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_function__(function, types, args, kwargs or {})
        return 2 * result if function is nn.functional.linear else result


@pytest.mark.parametrize("end", ["q_proj.base_layer", "down_proj.base_layer", "k_proj.base_layer"])
def test_weights_with_operators_of_their_own_keep_them(end: str, fused: Any, plain: Any) -> None:
    before = compute(plain)
    for model in (fused, plain):
        for layer in named(model, end):
            layer.weight = nn.Parameter(layer.weight.detach().as_subclass(Doubled), requires_grad=False)
    found, wanted = (compute(model).as_subclass(torch.Tensor) for model in (fused, plain))
    assert float((wanted - before).detach().abs().max()) > 0.1
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


VARIANTS: dict[str, tuple[dict[str, Any], int]] = {"rsLoRA": ({"rsLoRA": True}, 14), "doRA": ({"doRA": True}, 0)}
"""Variants of LoRA, each with the number of layers of the tiny model that train with a kernel."""


@pytest.mark.parametrize("variant", VARIANTS)
def test_an_adapter_is_fused_only_where_the_kernel_computes_all_that_peft_computes(variant: str, folder: Path) -> None:
    spec, number = VARIANTS[variant]
    plain, fused = (trained_model(folder, lora=True, **spec) for _ in range(2))
    report = use_fused_kernels(fused)
    assert report.replaced.get(KernelPart.PROJECTIONS, 0) == number
    left = {found.part: found.count for found in report.left}
    assert left.get(KernelPart.PROJECTIONS, 0) == 14 - number
    assert_same(fused, plain)


def test_a_head_with_an_adapter_still_turns_logits_into_the_loss(tiny_model: Path) -> None:
    """`use_fused_kernels` and the objective, which computes the loss, both replace the forward function of the head."""
    batch, results = batch_of([FIRST], [SECOND]), []
    for fuses in (True, False):
        model = model_of(tiny_model)
        replaced = use_fused_kernels(model).replaced if fuses else {}
        assert (KernelPart.PROJECTIONS in replaced) == fuses
        engine = OneProcess(model)
        loss = engine.loss(batch)
        assert loss.shape == ()
        assert ("_ProjectionsBackward" in nodes_of(loss)) == fuses
        results.append(gradients(engine, batch))
    for name, gradient in results[0].items():
        torch.testing.assert_close(gradient, results[1][name], rtol=1e-4, atol=1e-6, msg=name)
