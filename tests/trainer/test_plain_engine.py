"""The plain engine makes the updates of a plain PyTorch loop and of DeepSpeed's engine, and its states are those of
DeepSpeed's engine bit for bit, so that a run can change the engine between two attempts. It needs 16 bytes for each
trained parameter.
"""

from __future__ import annotations

import itertools
import json
import math
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch.profiler import ProfilerActivity, profile
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

from finetune_trainer.data.batches import collate
from finetune_trainer.data.examples import Example
from finetune_trainer.data.order import global_batch
from finetune_trainer.engine import gradient_norm, masters
from finetune_trainer.engine.checks import check_model
from finetune_trainer.engine.engine import FIRST_MOMENT, MASTER, SECOND_MOMENT
from finetune_trainer.engine.fragment_snapshot import ALIVE, FragmentSnapshots
from finetune_trainer.engine.gradient_norm import clipping_factor
from finetune_trainer.engine.interface import TrainingEngine
from finetune_trainer.engine.masters import Bf16Masters, Fp32Masters
from finetune_trainer.engine.plain_engine import PlainEngine
from finetune_trainer.engine.state import STATE_KINDS, load_state, take_snapshot
from finetune_trainer.kernels.parts import KernelPart
from finetune_trainer.model.attention import Kernel
from finetune_trainer.model.load import trained_parameters
from finetune_trainer.pod.errors import Damaged
from tests.trainer import test_lora_variants as variants
from tests.trainer.engine_runs import (
    GLOBAL_BATCH,
    PLAIN,
    RATE,
    ROWS,
    EngineRun,
    Figures,
    load,
    make_engine,
    micro_batcher,
    one_step,
    state_folder,
    train,
)
from tests.trainer.kernel_counts import VIEWS
from tests.trainer.plain_loop import Plain, PlainExample, plain_loop
from tests.trainer.zygote import END_SECONDS, ends_of, zygote

STEPS = 6
DECAY = 0.1
STATE_FILE = "state-00000-of-00001.safetensors"


def state_after(run: EngineRun, scratch: Path) -> dict[str, torch.Tensor]:
    """Return the training state at the end of ``run``, by parameter and kind."""
    state: dict[str, torch.Tensor] = load_file(state_folder(run, scratch, len(run.parts) - 1) / STATE_FILE)
    return state


# ---- the plain loop ----


@pytest.fixture(scope="module")
def plain(tiny_model: Path) -> Callable[[str, float], Plain]:
    """A function from method and weight decay to the results of the plain training loop."""
    torch.set_num_threads(1)
    known: dict[tuple[str, float], Plain] = {}
    examples = [
        PlainExample(
            [int(token) for token in example.ids],
            [example.spans[0][0] <= position for position in range(len(example.ids))],
        )
        for example in micro_batcher(tiny_model).examples
    ]
    batches = [global_batch(step, rows=ROWS, global_batch_size=GLOBAL_BATCH, seed=42) for step in range(1, STEPS + 1)]

    def results(method: str, decay: float) -> Plain:
        if (method, decay) not in known:
            known[method, decay] = plain_loop(
                tiny_model, method, examples, examples[:2], batches, rate=RATE, weight_decay=decay
            )
        return known[method, decay]

    return results


@pytest.mark.parametrize(
    "run",
    [
        EngineRun(method="LoRA", parts=((PLAIN, STEPS),), micro=6, decay=DECAY),
        EngineRun(method="LoRA", parts=((PLAIN, STEPS),), micro=1, recompute=True),
        EngineRun(method="Full", parts=((PLAIN, STEPS),), micro=4),
        EngineRun(method="Full", parts=((PLAIN, STEPS),), micro=2, recompute=True, decay=DECAY),
    ],
    ids=lambda run: run.name,
)
def test_losses_and_weights_are_those_of_a_plain_loop(
    run: EngineRun, plain: Callable[[str, float], Plain], tiny_model: Path, tmp_path: Path
) -> None:
    """In the runs of all parameters the gradients are clipped in every step."""
    wanted = plain(run.method, run.decay)
    found = train(run, tiny_model, tmp_path)
    assert found.losses == pytest.approx(wanted.losses, rel=1e-6)
    assert (run.method == "Full") == (min(found.norms) > run.clipping)
    state = state_after(run, tmp_path)
    expected = trained_parameters(wanted.model)
    assert {key.rpartition("/")[0] for key in state} == expected.keys()
    for name, parameter in expected.items():
        torch.testing.assert_close(state[f"{name}/{MASTER}"], parameter.detach(), rtol=1e-4, atol=1e-6, msg=name)


def test_the_kernels_do_not_change_a_bit_of_a_full_training_in_fp32(tiny_model: Path) -> None:
    """A difference in the last bits of a gradient becomes a large one of some weight, because AdamW divides by the size
    of the gradient also where only rounding is left of the gradient. This test is about the CPU, and about models whose
    layers are small enough that the library of the processor adds up a product in one part."""
    torch.set_num_threads(1)
    weights = []
    for plain in ((), tuple(KernelPart)):
        run = EngineRun(method="Full", parts=((PLAIN, STEPS),), micro=4, decay=DECAY)
        model, batches = load(run, tiny_model), micro_batcher(tiny_model)
        engine = PlainEngine(model, run.optimization(PLAIN), torch.device("cpu"), plain_kernels=plain)
        assert bool(engine.kernels.replaced) == (not plain)
        engine.train()
        # The terms of the loss that is reported are added in another order.
        norms = [one_step(engine, batches, run, step)[1] for step in range(1, STEPS + 1)]
        weights.append((norms, {name: value.detach().clone() for name, value in model.named_parameters()}))
        engine.close()
    (norms, kernels), (plain_norms, plain_weights) = weights
    assert norms == plain_norms
    for name, weight in plain_weights.items():
        assert torch.equal(kernels[name], weight), name


def test_a_training_state_without_some_parameters_is_damaged(tiny_model: Path, tmp_path: Path) -> None:
    """Otherwise the training would go on with the moments and values of a new optimizer for these parameters."""
    run = EngineRun(method="LoRA", parts=((PLAIN, 1),))
    train(run, tiny_model, tmp_path)
    file = state_folder(run, tmp_path, 0) / STATE_FILE
    tensors = load_file(file)
    name = next(iter(tensors)).rpartition("/")[0]
    save_file({key: value for key, value in tensors.items() if not key.startswith(f"{name}/")}, file)
    engine = make_engine(run, PLAIN, load(run, tiny_model))
    with pytest.raises(Damaged, match=f"lacks parameter {name}"):
        load_state(engine, file.parent, updates=1)


def test_lora_plus_trains_as_with_the_optimizer_of_peft(tiny_model: Path, tmp_path: Path) -> None:
    variant = variants.VARIANTS["plus"]
    assert variant.ratio is not None
    run = EngineRun(
        method="LoRA",
        parts=((PLAIN, variants.STEPS),),
        decay=variant.decay,
        lora_plus_ratio=variant.ratio,
        rate=variants.RATE,
    )
    torch.set_num_threads(1)
    wanted = variants.plain_peft(variant, tiny_model)
    assert train(run, tiny_model, tmp_path).losses == pytest.approx(wanted, rel=1e-6)


# ---- DeepSpeed's engine ----

EXACT = [
    EngineRun(method="LoRA", parts=((2, STEPS),), clipping=0.3, decay=DECAY, lora_plus_ratio=4),
    EngineRun(method="LoRA", parts=((2, STEPS),), precision="bf16", micro=1, recompute=True, infinite=2),
    EngineRun(method="LoRA", parts=((1, STEPS),), precision="bf16", micro=6),
    EngineRun(method="LoRA", parts=((2, STEPS),), precision="bf16", quantization="NF4"),
    EngineRun(method="Full", parts=((1, STEPS),), infinite=2),
    EngineRun(method="Full", parts=((2, STEPS),), precision="bf16", decay=DECAY),
    EngineRun(method="Full", parts=((1, STEPS),), precision="bf16", micro=6, recompute=True),
]
"""Runs at ZeRO stages 1 and 2 that the plain engine repeats bit for bit. At stage 1 in bf16, DeepSpeed adds up the
gradients of several micro-batches in bf16, so these runs have one micro-batch."""
CLOSE = [
    EngineRun(method="LoRA", parts=((0, STEPS),), decay=DECAY, lora_plus_ratio=4),
    EngineRun(method="Full", parts=((0, STEPS),), decay=DECAY, recompute=True),
]
"""Runs at ZeRO stage 0, which rounds norms and factors in another order."""
CHANGED = [
    EngineRun(method=method, parts=parts, precision=precision, decay=DECAY)
    for method, precision in (("LoRA", "fp32"), ("Full", "bf16"))
    for parts in (((2, 3), (PLAIN, 3)), ((PLAIN, 3), (2, 3)))
]
"""Runs that change the engine in the middle."""
OFFLOADED = [
    EngineRun(method="Full", parts=((2, STEPS),), offload=True, infinite=2),
    EngineRun(method="LoRA", parts=((1, STEPS),), precision="bf16", offload=True, infinite=2),
]
"""Runs that drop the gradient of a step while DeepSpeed adds up gradients in the memory of the host."""
MORE_PASSES = {"fp32": 10.5, "bf16": 5.0}
"""How many more passes a step of DeepSpeed's engine may make than a step of the plain engine. One pass reads or writes
a number of 4 bytes for each trained parameter. In bf16 the plain engine has passes of its own, because it stores fp32
values in two parts."""
Made = dict[EngineRun, tuple[Figures, dict[str, torch.Tensor]]]


def on(run: EngineRun, kind: Any) -> EngineRun:
    """Return ``run`` with all its steps made by the engine ``kind``."""
    return run.model_copy(update={"parts": ((kind, sum(steps for _, steps in run.parts)),)})


@pytest.fixture(scope="module")
def made(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """The figures and the last state of all runs of the lists above."""
    folder = tmp_path_factory.mktemp("engines")
    runs = [*EXACT, *CLOSE, *CHANGED, *OFFLOADED]
    asked = {"model": str(tiny_model), "scratch": str(folder), "runs": [run.model_dump() for run in runs]}
    (folder / "runs.json").write_text(json.dumps(asked))
    ranks = zygote().start_ranks("tests.trainer.engine_runs", [[str(folder / "runs.json")]], folder)
    assert ends_of(ranks, 2 * END_SECONDS) == [0], (folder / "rank-0.log").read_text()
    figures = [Figures.model_validate(each) for each in json.loads((folder / "figures.json").read_text())]
    return {run: (each, state_after(run, folder)) for run, each in zip(runs, figures, strict=True)}


@pytest.mark.gang
@pytest.mark.parametrize("run", EXACT, ids=lambda run: run.name)
def test_updates_are_those_of_deepspeed_bit_for_bit(
    run: EngineRun, made: Made, tiny_model: Path, tmp_path: Path
) -> None:
    torch.set_num_threads(1)
    wanted, state = made[run]
    found = train(on(run, PLAIN), tiny_model, tmp_path)
    assert found.losses == wanted.losses
    assert str(found.norms) == str(wanted.norms), "str, because NaN is not equal to itself"
    assert math.isnan(found.norms[1]) == (run.infinite == 2)
    assert_same_state(state_after(on(run, PLAIN), tmp_path), state)


@pytest.mark.gang
@pytest.mark.parametrize("run", EXACT, ids=lambda run: run.name)
def test_deepspeed_passes_over_memory_a_few_times_more_than_the_plain_engine(
    run: EngineRun, made: Made, tiny_model: Path, tmp_path: Path
) -> None:
    """The settings in `engine/config.py` must have an effect in the version of DeepSpeed that is installed. In fp32 the
    passes are the flat copy of the gradient (2), the copy of the new weights (3), and two that move nothing: gradients
    that are reduced over one rank (2) and copied onto themselves (3)."""
    torch.set_num_threads(1)
    more = made[run][0].passes - train(on(run, PLAIN), tiny_model, tmp_path).passes
    print(f"{run.name}: {more:+.1f} passes")
    assert more < MORE_PASSES[run.precision]


@pytest.mark.gang
@pytest.mark.parametrize("run", CLOSE, ids=lambda run: run.name)
def test_updates_are_those_of_deepspeed_without_zero(
    run: EngineRun, made: Made, tiny_model: Path, tmp_path: Path
) -> None:
    torch.set_num_threads(1)
    wanted, state = made[run]
    found = train(on(run, PLAIN), tiny_model, tmp_path)
    assert found.losses == pytest.approx(wanted.losses, rel=1e-6)
    assert found.norms == pytest.approx(wanted.norms, rel=1e-6)
    own = state_after(on(run, PLAIN), tmp_path)
    assert list(own) == list(state)
    for key, value in own.items():
        torch.testing.assert_close(value, state[key], rtol=1e-4, atol=1e-6, msg=key)


@pytest.mark.gang
@pytest.mark.parametrize("run", OFFLOADED, ids=lambda run: run.name)
def test_a_discarded_gradient_in_the_memory_of_the_host_is_not_in_the_next_step(
    run: EngineRun, made: Made, tiny_model: Path, tmp_path: Path
) -> None:
    torch.set_num_threads(1)
    wanted, _ = made[run]
    assert [math.isnan(norm) for norm in wanted.norms] == [step == run.infinite for step in range(1, STEPS + 1)]
    found = train(on(run, PLAIN), tiny_model, tmp_path)
    # In bf16, DeepSpeed adds up the gradients of several micro-batches in bf16 at stage 1.
    near = 1e-6 if run.precision == "fp32" else 1e-2
    assert found.losses == pytest.approx(wanted.losses, rel=near)


@pytest.mark.gang
@pytest.mark.parametrize("run", CHANGED, ids=lambda run: run.name)
def test_a_run_that_changes_the_engine_goes_on_bit_for_bit(
    run: EngineRun, made: Made, tiny_model: Path, tmp_path: Path
) -> None:
    torch.set_num_threads(1)
    figures, state = made[run]
    stayed = train(on(run, PLAIN), tiny_model, tmp_path)
    assert (figures.losses, figures.norms) == (stayed.losses, stayed.norms)
    assert_same_state(state, state_after(on(run, PLAIN), tmp_path))


def assert_same_state(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    """Assert that names, order, types and bits of two stored states are the same."""
    assert list(found) == list(wanted)
    for key, value in found.items():
        assert value.dtype == wanted[key].dtype == torch.float32
        assert torch.equal(value.view(torch.int32), wanted[key].view(torch.int32)), key


# ---- fp32 values in bf16 weights and remainders ----


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


def test_parts_of_a_parameter_in_several_batches_train_like_one(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = EngineRun(method="Full", parts=((PLAIN, 3),), precision="bf16", decay=DECAY)
    wanted = train(run, tiny_model, tmp_path / "one"), state_after(run, tmp_path / "one")
    monkeypatch.setattr(masters, "BATCH_ELEMENTS", 1024)
    found = train(run, tiny_model, tmp_path / "many"), state_after(run, tmp_path / "many")
    assert found[0].losses == wanted[0].losses
    assert_same_state(found[1], wanted[1])


def test_a_parameter_that_is_not_contiguous_trains_in_its_place() -> None:
    parameter = torch.nn.Parameter(torch.arange(6.0).view(2, 3).T.to(torch.bfloat16))
    made = Bf16Masters({"0": parameter}, weight_decay=0.0)
    (parameter * torch.tensor([[1.0, -1.0]], dtype=torch.bfloat16)).sum().backward()
    with torch.no_grad():
        made.update(0.5, gradient_factor=1.0)
        found = made.read("0", MASTER)
    torch.testing.assert_close(found, torch.tensor([[-0.5, 3.5], [0.5, 4.5], [1.5, 5.5]]))
    assert parameter.tolist() == [[-0.5, 3.5], [0.5, 4.5], [1.5, 5.5]]


# ---- gradients ----


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_discarded_gradient_changes_nothing(precision: Any, tiny_model: Path) -> None:
    run = EngineRun(method="Full", parts=((PLAIN, 1),), precision=precision, infinite=2)
    engine, batches = make_engine(run, PLAIN, load(run, tiny_model)), micro_batcher(tiny_model)
    one_step(engine, batches, run, 1)
    before = whole_state(engine)
    loss, norm = one_step(engine, batches, run, 2)
    assert math.isfinite(loss)
    assert math.isnan(norm)
    assert_same_state(whole_state(engine), before)
    assert engine.gradient_norm() == 0
    assert math.isfinite(one_step(engine, batches, run, 3)[1])
    assert not torch.equal(next(iter(whole_state(engine).values())), next(iter(before.values())))


def whole_state(engine: TrainingEngine) -> dict[str, torch.Tensor]:
    return {
        f"{name}/{kind}": tensor.clone()
        for name in engine.parameter_shapes
        for kind, tensor in engine.read_state(name).items()
    }


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


# ---- the other functions of the engine ----


@pytest.fixture
def engine(tiny_model: Path) -> Iterator[TrainingEngine]:
    run = EngineRun(method="LoRA", parts=((PLAIN, 1),))
    made = make_engine(run, PLAIN, load(run, tiny_model))
    yield made
    made.close()


FIRST, SECOND = Example((4, 9, 17, 25, 33, 41, 1), [(3, 7)]), Example((5, 12, 19, 26, 1), [(2, 5)])


def test_the_checks_of_a_model_pass_with_the_plain_engine(engine: TrainingEngine) -> None:
    chosen = check_model(engine, [FIRST, SECOND], pad=1, packing=True, kernels=[Kernel.SDPA])
    assert (chosen.kernel, chosen.notices) == (Kernel.SDPA, [])
    assert engine.model.get_base_model().config._attn_implementation == "sdpa"
    assert engine.model.training
    assert not engine.lockstep


def test_excluded_tokens_and_full_logits_are_those_of_the_objective(engine: TrainingEngine) -> None:
    batch = collate([[(FIRST, 1)]], pad=1, packed=False)
    with torch.no_grad():
        inside, whole = float(engine.loss(batch)), float(engine.loss(batch, full_logits=True))
        assert inside == pytest.approx(whole, rel=1e-6)
        engine.exclude_tokens([7, 8])
        assert float(engine.loss(batch)) < inside
        engine.exclude_tokens([])
        engine.use_full_logits()
        assert float(engine.loss(batch)) == whole
        assert engine.logits(batch).shape == (4, engine.model.config.vocab_size)
        ids = torch.tensor([list(FIRST.ids)])
        assert engine.forward(input_ids=ids).logits.shape == (1, len(FIRST.ids), engine.model.config.vocab_size)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_weight_of_a_checkpoint_becomes_that_of_the_model(precision: Any, tiny_model: Path) -> None:
    run = EngineRun(method="LoRA", parts=((PLAIN, 1),), precision=precision)
    model = load(run, tiny_model)
    engine = make_engine(run, PLAIN, model)
    name, shape = next(iter(engine.parameter_shapes.items()))
    value = torch.full(shape, 1 / 3)
    engine.write_weight(name, value)
    assert torch.equal(trained_parameters(model)[name].detach(), value.to(model.dtype))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_snapshots_from_fragments_are_those_of_whole_parameters(
    precision: Any, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With 1,000 values in a batch, large parameters have parts in several batches."""
    monkeypatch.setattr(masters, "BATCH_ELEMENTS", 1000)
    run = EngineRun(method="Full", parts=((PLAIN, 2),), precision=precision)
    engine, batches, progress = make_engine(run, PLAIN, load(run, tiny_model)), micro_batcher(tiny_model), list[int]()
    snapshots = FragmentSnapshots(
        engine, rank=0, world_size=1, piece_bytes=4096, note_progress=lambda: progress.append(1)
    )
    for step in range(1, 4):
        wanted, found = take_snapshot(engine, rank=0, world_size=1), snapshots.take()
        assert_same_state(dict(found.tensors), wanted)
        found.buffer.release()
        assert len(progress) == step * len(wanted), "each part is a sign of life"
        one_step(engine, batches, run, step)


def test_a_snapshot_that_failed_leaves_nothing_in_the_next_one(tiny_model: Path) -> None:
    run = EngineRun(method="LoRA", parts=((PLAIN, 2),))
    engine, batches = make_engine(run, PLAIN, load(run, tiny_model)), micro_batcher(tiny_model)
    parts, failing = itertools.count(1), {1, 20, 41}

    def fail() -> None:
        if next(parts) in failing:
            raise OSError("the device is gone")

    snapshots = FragmentSnapshots(engine, rank=0, world_size=1, piece_bytes=1024, note_progress=fail)
    for step, _ in enumerate(failing, 1):
        with pytest.raises(OSError, match="the device is gone"):
            snapshots.take()
        assert snapshots.free == ALIVE
        one_step(engine, batches, run, step)
    held = [snapshots.take() for _ in range(ALIVE)]
    wanted = take_snapshot(engine, rank=0, world_size=1)
    for each in held:
        assert_same_state(dict(each.tensors), wanted)


def test_ranks_of_one_training_are_refused(tiny_model: Path) -> None:
    run = EngineRun(method="LoRA", parts=((PLAIN, 1),))
    model = load(run, tiny_model)
    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    try:
        with pytest.raises(ValueError, match=r"^the plain engine trains in one process, and this training has 2$"):
            make_engine(run, PLAIN, model)
    finally:
        dist.destroy_process_group()


def test_a_closed_engine_holds_no_memory(tiny_model: Path) -> None:
    run = EngineRun(method="Full", parts=((PLAIN, 1),), precision="bf16")
    model = load(run, tiny_model)
    engine = make_engine(run, PLAIN, model)
    one_step(engine, micro_batcher(tiny_model), run, 1)
    alive = weakref.ref(model)
    moment = weakref.ref(engine.read_state("model.norm.weight")[FIRST_MOMENT])
    del model
    engine.close()
    assert alive() is None
    assert moment() is None


# ---- memory and kernels ----


def memory_of(step: Callable[[], object]) -> tuple[int, int]:
    """Call ``step``, and return by how many bytes the memory of torch's tensors has grown, and by how many bytes it had
    grown at most in between. Both come from the events of torch's allocator."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        step()
    grown = most = 0
    results: Any = profiled.profiler
    events = [event for event in results.kineto_results.events() if event.name() == "[memory]"]
    assert events
    for event in sorted(events, key=lambda event: event.start_ns()):
        grown += event.nbytes()
        most = max(most, grown)
    return grown, most


@pytest.mark.parametrize(("precision", "weight", "standing"), [("bf16", 2, 12), ("fp32", 4, 12)])
@pytest.mark.parametrize("accumulation", [1, 3])
def test_a_step_needs_16_bytes_for_each_trained_parameter(
    precision: Any, weight: int, standing: int, accumulation: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Measured with 15 million parameters, of which the largest has 2 %. Batches and pieces are as small in relation to
    this model as they are to one with 7 billion parameters. The text has three tokens, so that activations are small.
    """
    monkeypatch.setattr(masters, "BATCH_ELEMENTS", 40_000)
    monkeypatch.setattr(gradient_norm, "NORM_ELEMENTS", 10_000)
    monkeypatch.setattr(masters, "SMALL_ELEMENTS", 2_500)
    monkeypatch.setattr(masters, "WAITING_ELEMENTS", 10_000)
    torch.set_num_threads(1)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=320,
        intermediate_size=864,
        num_hidden_layers=12,
        num_attention_heads=4,
        num_key_value_heads=4,
        tie_word_embeddings=False,
        max_position_embeddings=128,
    )
    model = LlamaForCausalLM(config).to({"bf16": torch.bfloat16, "fp32": torch.float32}[precision])
    model.config.use_cache = False
    count = sum(parameter.numel() for parameter in model.parameters())
    run = EngineRun(method="Full", parts=((PLAIN, 1),), precision=precision)
    made: list[PlainEngine] = []
    grown, _ = memory_of(lambda: made.append(PlainEngine(model, run.optimization(PLAIN), torch.device("cpu"))))
    assert weight + grown / count == pytest.approx(standing, abs=0.05)
    (engine,) = made
    batch = collate([[(Example((3, 4, 5, 6), [(0, 4)]), 0)]], pad=1, packed=False)

    def accumulate() -> None:
        for index in range(accumulation):
            engine.backward(engine.loss(batch) / batch.tokens, last=index == accumulation - 1)

    peaks = {}
    level = weight * count + grown
    for _ in range(2):
        for phase, part in (
            ("gradients", accumulate),
            ("norm", engine.gradient_norm),
            ("update", lambda: engine.step(RATE)),
        ):
            change, most = memory_of(part)
            peaks[phase] = (level + most) / count
            level += change
        assert level / count == pytest.approx(standing, abs=0.05)
    print(
        f"{precision}, {accumulation} micro-batches: " + ", ".join(f"{key} {peak:.2f}" for key, peak in peaks.items())
    )
    assert 15.9 < peaks["update"] < 16.2
    assert max(peaks.values()) < 16.5


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
