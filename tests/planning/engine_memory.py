"""Measures how much memory an optimizer step of the trainer's own engine takes at real sizes, without the memory and
without the arithmetic.

torch's FakeTensorMode runs every operation on tensors that have a shape, a type and no data, and torch's "fake" process
group answers every collective call at once. So one process on a CPU runs the step of one rank of many, of a model with
70 billion parameters, in seconds. A dispatch mode counts the bytes of all storages that are alive, as
`torch.distributed._tools.mem_tracker` does, which itself stops at ZeRO-3 and at a second step.
`test_engine_memory.py` compares the count with torch's tracker where that one works, and with the events of the
allocator in a step with real tensors.

`python -m tests.planning.engine_memory CASE…` prints what it measured of cases of `memory_cases.py` as JSON, one object
a line. `test_planned_memory.py` calls `measure_all`, which starts this program once for each number of processes and
each rank, which the variable RANK names.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import weakref
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from types import SimpleNamespace
from typing import Any

from tests.planning.memory_cases import CASES, MemoryCase

PHASES = ("standing", "forward", "backward", "norm", "update", "evaluation", "checkpoint")
TIMEOUT = 600
"""Seconds after which one program that measures is stopped."""


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """Bytes of one rank, or the highest ones of several. All but ``standing`` are peaks."""

    parameters: int
    """Number of parameters of the model with its adapters."""
    trained: int
    """Number of trained parameters."""
    standing: int
    """Bytes between two optimizer steps: weights, optimizer state and the buffers that DeepSpeed keeps."""
    forward: int
    """Peak until the loss of the last micro-batch is known."""
    backward: int
    """Peak of the backward passes."""
    norm: int
    """Peak while the norm of the gradient is computed."""
    update: int
    """Peak of the update."""
    evaluation: int
    """Peak of a forward pass without gradients."""
    checkpoint: int
    """Peak while the state of one parameter after the other is read for a checkpoint."""

    @property
    def peak(self) -> int:
        """The peak of a training step."""
        return max(self.forward, self.backward, self.norm, self.update)


def measure_all(names: Sequence[str]) -> dict[str, Measurement]:
    """Measure the ranks of the cases ``names``, each in a program with the case's number of processes, and return the
    highest figures."""
    found: dict[str, Measurement] = {}
    programs = {(CASES[name].processes, rank) for name in names for rank in CASES[name].measured_ranks}
    for processes, rank in sorted(programs):
        cases = [name for name in names if CASES[name].processes == processes]
        group = [name for name in cases if rank in CASES[name].measured_ranks]
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-m", "tests.planning.engine_memory", *group],
            env={**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "RANK": str(rank)},
            stdout=subprocess.PIPE,
            text=True,
            check=True,
            timeout=TIMEOUT,
        )
        for line in done.stdout.splitlines():
            if line.startswith("{"):
                values = json.loads(line)
                name = values.pop("case")
                before = asdict(found[name]) if name in found else values
                found[name] = Measurement(**{key: max(value, before[key]) for key, value in values.items()})
    return found


def main(names: Sequence[str]) -> None:
    """Measure the cases ``names``, which must have the same number of processes, and print one JSON object each."""
    import torch
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.set_num_threads(1)
    rank, processes = int(os.environ.get("RANK", "0")), CASES[names[0]].processes
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(processes))
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=rank, world_size=processes)
    let_fake_tensors_through()
    for name in names:
        print(json.dumps({"case": name, **asdict(measure(CASES[name]))}), flush=True)


def let_fake_tensors_through() -> None:
    """Change the places in libraries that need values, which fake tensors do not have, or that need another device. The
    change is for this process."""
    import deepspeed.runtime.zero.partition_parameters as sharding
    import deepspeed.runtime.zero.partitioned_param_coordinator as coordinator
    import torch
    import transformers.masking_utils as masks

    from finetune_trainer.loss import head

    # DeepSpeed asserts that lists of all ranks agree. The fake process group answers with zeros.
    coordinator.assert_ints_same_as_other_ranks = sharding.assert_ints_same_as_other_ranks = lambda ints: None
    # transformers looks into the position ids whether examples are packed. Here none are.
    masks.find_packed_sequence_indices = lambda position_ids: None
    # On a CPU the trainer takes smaller chunks for the head than on a GPU.
    head.CPU_CHUNK_LOGITS = head.CHUNK_LOGITS
    # torch would exchange the parameters of a module for new ones where they are fake, which fails where an optimizer
    # refers to the old ones. DeepSpeed calls this with types that the parameters have already.
    torch.nn.Module._apply = _convert_in_place
    _let_kernels_take_fake_tensors()


def _let_kernels_take_fake_tensors() -> None:
    """Let the trainer's kernels compute with fake tensors, as they do on a GPU. With other tensors they compute as
    before, because modules are recognized by the values that they compute for a few numbers."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensor
    from torch.utils._python_dispatch import _disable_current_modes

    from finetune_trainer.engine import gradient_norm
    from finetune_trainer.kernels import install, projections, recognition, rms_norm, rotary, shared_projections

    gradient_norm.CPU_NORM_ELEMENTS = gradient_norm.NORM_ELEMENTS
    aten, alias = rms_norm.ATEN, rotary.alias

    def with_values(function: Callable[..., Any]) -> Callable[..., Any]:
        """Return ``function``, which computes with tensors of its own, as a function that computes their values."""

        def computed(*inputs: Any) -> Any:
            with _disable_current_modes():
                return function(*inputs)

        return computed

    def are_plain(*tensors: Any) -> bool:
        known = (torch.Tensor, torch.nn.Parameter, FakeTensor)
        return all(tensor is None or type(tensor) in known for tensor in tensors)

    def is_fake(x: Any) -> bool:
        return isinstance(x, FakeTensor)

    # On a CPU, torch computes a norm with several operators.
    def norm(x: Any, *others: Any) -> Any:
        if not is_fake(x):
            return aten._fused_rms_norm(x, *others)
        return torch.empty_like(x), torch.empty((*x.shape[:-1], 1), dtype=torch.float32)

    def norm_backward(_gradient: Any, x: Any, _shape: Any, _reciprocal: Any, weight: Any, wanted: Any) -> Any:
        return torch.empty_like(x) if wanted[0] else None, torch.empty_like(weight) if wanted[1] else None

    # A fake tensor that is set to the memory of another one never lets go of the memory.
    def part_or_alias(part: Any) -> Any:
        return part if is_fake(part) else alias(part)

    rms_norm.ATEN = SimpleNamespace(_fused_rms_norm=norm, _fused_rms_norm_backward=norm_backward)
    for name in ("norm_form", "gate_activation", "why_not_turned"):
        setattr(recognition, name, with_values(getattr(recognition, name)))
    replaced: tuple[tuple[Any, str, Callable[..., Any]], ...] = (
        (install, "are_plain", are_plain),
        (shared_projections, "are_plain", are_plain),
        (rms_norm, "has_backward_kernel", is_fake),
        (rotary, "alias", part_or_alias),
        (projections, "alias", part_or_alias),
    )
    for module, name, function in replaced:
        setattr(module, name, function)


def _convert_in_place(module: Any, convert: Callable[[Any], Any], recurse: bool = True) -> Any:
    for child in module.children():
        _convert_in_place(child, convert)
    for parameter in module.parameters(recurse=False):
        new = convert(parameter.data)
        if new.dtype != parameter.dtype or new.device != parameter.device:
            parameter.data = new
    for name, buffer in module._buffers.items():
        if buffer is not None:
            module._buffers[name] = convert(buffer)
    return module


def live_storages() -> Any:
    """Return a context manager that counts the bytes of all storages that an operation makes and that still exist:
    ``live`` now, ``peak`` at most, and ``peak_of(work)`` while ``work`` is called."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    class LiveStorages(TorchDispatchMode):  # type: ignore[misc]  # torch has no types here
        """Counts the bytes of all storages that an operation made and that still exist."""

        def __init__(self) -> None:
            super().__init__()
            self.live = self.peak = 0
            self._sizes: dict[int, int] = {}

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            for tensor in tree_leaves(out):
                # DeepSpeed remembers shapes as tensors on the device meta, which have no memory.
                if isinstance(tensor, torch.Tensor) and tensor.device.type != "meta":
                    self._add(tensor.untyped_storage())
            return out

        def _add(self, storage: Any) -> None:
            if storage._cdata in self._sizes:
                return
            self._sizes[storage._cdata] = storage.nbytes()
            self.live += storage.nbytes()
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._remove, storage._cdata)

        def _remove(self, key: int) -> None:
            self.live -= self._sizes.pop(key)

        def peak_of(self, work: Callable[[], object]) -> int:
            """Call ``work`` and return the peak meanwhile."""
            self.peak = self.live
            work()
            return self.peak

    return LiveStorages()


def measure(case: MemoryCase) -> Measurement:
    """Run an optimizer step of ``case`` after the first one, the reading of a checkpoint and an evaluation, and return
    the peaks."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils._python_dispatch import TorchDispatchMode

    from finetune_trainer.engine.making import make_engine
    from finetune_trainer.kernels.parts import KernelPart

    class Scalars(TorchDispatchMode):  # type: ignore[misc]  # torch has no types here
        """Answers what the value of a fake tensor is: zero, so that no gradient counts as infinite. No value of a mask
        counts as true, as the plain engine's values between two numbers in bf16 are so few."""

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is torch.ops.aten._local_scalar_dense.default:
                return 0.0 if args[0].dtype.is_floating_point else 0
            if func is torch.ops.aten.nonzero.default:
                return args[0].new_empty((0, args[0].ndim), dtype=torch.int64)
            if func is torch.ops.aten.index.Tensor and args[1][0] is not None and args[1][0].dtype is torch.bool:
                return args[0].new_empty((0, *args[0].shape[args[1][0].ndim :]))
            return func(*args, **(kwargs or {}))

    memory = live_storages()
    with FakeTensorMode(allow_non_fake_inputs=True), memory, Scalars():
        model = _model(case)
        sizes = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
        engine = make_engine(model, case.optimization(), torch.device("cpu"))
        assert {KernelPart.NORMS, KernelPart.ROTARY} <= engine.kernels.replaced.keys(), engine.kernels.description
        del model
        engine.train()
        batch = _batch(case)

        def forward_and_backward() -> tuple[int, int]:
            forward = backward = 0
            for number in range(case.accumulation):
                losses: list[Any] = []
                forward = max(forward, memory.peak_of(lambda kept=losses: kept.append(engine.loss(batch) * 1.0)))
                last = number == case.accumulation - 1
                backward = max(
                    backward, memory.peak_of(lambda kept=losses, last=last: engine.backward(kept.pop(), last=last))
                )
            return forward, backward

        def evaluate() -> None:
            with torch.no_grad():
                engine.loss(batch)

        def read_checkpoint() -> None:
            with torch.no_grad():
                for name in engine.parameter_shapes:
                    engine.read_state(name)

        if case.stage == 3:
            # The first step records in which order the weights are needed, and all later ones fetch them ahead.
            forward_and_backward()
            engine.gradient_norm()
            engine.step(1e-4)
        else:
            engine.prepare_state(1)
        standing = memory.live
        forward, backward = forward_and_backward()
        norm = memory.peak_of(engine.gradient_norm)
        update = memory.peak_of(lambda: engine.step(1e-4))
        checkpoint = memory.peak_of(read_checkpoint)
        engine.train(False)
        evaluation = memory.peak_of(evaluate)
        engine.close()
    return Measurement(
        parameters=sum(size for size, _ in sizes),
        trained=sum(size for size, trained in sizes if trained),
        standing=standing,
        forward=forward,
        backward=backward,
        norm=norm,
        update=update,
        evaluation=evaluation,
        checkpoint=checkpoint,
    )


def _model(case: MemoryCase) -> Any:
    """Return the model of ``case`` as the trainer makes it: in bf16 or fp32, with adapters on all linear layers and
    experts where the method is LoRA."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from finetune_core.api.method import LoRASpec
    from finetune_trainer.model.adapters import add_adapters
    from finetune_trainer.model.load import DTYPES, enable_gradient_checkpointing, switch_off_dropout

    config = AutoConfig.for_model(**case.configuration)
    dtype = DTYPES[case.precision]
    torch.set_default_dtype(dtype)
    try:
        model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    finally:
        torch.set_default_dtype(torch.float32)
    model.config.use_cache = False
    switch_off_dropout(model)
    if case.recompute:
        enable_gradient_checkpointing(model)
    if case.rank is None:
        return model
    lora = LoRASpec(rank=case.rank, alpha=16, dropout=case.dropout)
    return add_adapters(
        model,
        lora,
        targets=case.targets(model),
        parameters=case.expert_weights(model),
        seed=1,
        base_name="base",
    )


def _batch(case: MemoryCase) -> Any:
    """Return a micro-batch of fake tensors in which every position has a target."""
    import torch

    from finetune_trainer.data.batches import Batch

    def ids(*shape: int) -> Any:
        return torch.zeros(*shape, dtype=torch.long)

    tokens = case.micro_batch * case.length
    shape = (case.micro_batch, case.length)
    return Batch(ids(*shape), None, ids(tokens), ids(tokens), ids(*shape), tokens, tokens)


if __name__ == "__main__":
    main(sys.argv[1:])
    sys.stdout.flush()
    os._exit(0)  # DeepSpeed's threads would wait for tensors that have no data.
