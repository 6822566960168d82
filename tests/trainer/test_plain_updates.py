"""The plain engine makes the updates of a plain PyTorch loop and of DeepSpeed's engine, and its states are those of
DeepSpeed's engine bit for bit, so that a run can change the engine between two attempts.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from finetune_trainer.data.order import global_batch
from finetune_trainer.engine.engine import MASTER
from finetune_trainer.engine.plain_engine import PlainEngine
from finetune_trainer.kernels.parts import KernelPart
from finetune_trainer.model.load import trained_parameters
from tests.trainer import test_lora_variants as variants
from tests.trainer.engine_runs import (
    GLOBAL_BATCH,
    PLAIN,
    RATE,
    ROWS,
    EngineRun,
    Figures,
    assert_same_state,
    load,
    micro_batcher,
    one_step,
    state_after,
    train,
)
from tests.trainer.plain_loop import Plain, PlainExample, plain_loop
from tests.trainer.zygote import END_SECONDS, ends_of, zygote

STEPS = 6
DECAY = 0.1


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
    EngineRun(method="Full", parts=((3, STEPS),)),
]
"""Runs at ZeRO stages 0 and 3, which round norms and factors in another order."""
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
MORE_PASSES = {"fp32": 10.5, "bf16": 6.5}
"""How many more passes a step of DeepSpeed's engine may make than a step of the plain engine. One pass reads or writes
a number of 4 bytes for each trained parameter. In bf16 the plain engine has passes of its own, because it stores fp32
values in two parts: 1.75 fewer than before it left the masks of ties as they are, so that the difference was 4.5."""
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
def test_updates_are_those_of_deepspeed_where_it_clips(
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
@pytest.mark.parametrize("run", [*EXACT, *CLOSE, *OFFLOADED], ids=lambda run: run.name)
def test_no_norm_is_computed_twice(run: EngineRun, made: Made) -> None:
    """DeepSpeed computes the norm at ZeRO stage 3 and with offload. These runs have one parameter group."""
    (stage, _), *_ = run.parts
    assert made[run][0].own_norms == (stage == 3 or run.offload)


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
