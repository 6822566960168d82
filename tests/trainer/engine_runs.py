"""Short trainings with an engine of the trainer in one process, without launcher, store and evaluation, so that tests
can compare engines step by step.

`train` makes the trainings. `python -m tests.trainer.engine_runs FILE` makes those that need torch's process group,
because DeepSpeed's engine does: FILE is JSON with the folder of the model (`model`), a scratch folder (`scratch`) and a
list of `EngineRun` (`runs`). The figures of all runs are written to `figures.json` in the scratch folder.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict

from finetune_core.api.method import LoRASpec
from finetune_core.contract import OptimizationConfig
from finetune_trainer.ranks import process

if TYPE_CHECKING:
    import torch

    from finetune_trainer.data.micro_batches import MicroBatcher
    from finetune_trainer.engine.interface import TrainingEngine

PLAIN: Literal["plain"] = "plain"
RATE = 1e-3
GLOBAL_BATCH = 6
ROWS = 20
STATE_FILE = "state-00000-of-00001.safetensors"
"""The file with the training state in each folder of `state_folder`."""
Kind = Literal["plain", 0, 1, 2, 3]
"""The plain engine, or a ZeRO stage of DeepSpeed."""


class EngineRun(BaseModel):
    """A training, and in which parts which engine makes it. Each part but the first resumes from the training state
    that the part before it has stored in files."""

    model_config = ConfigDict(frozen=True)

    method: Literal["LoRA", "Full"]
    parts: tuple[tuple[Kind, int], ...]
    """Engine and number of steps of each part."""
    precision: Literal["fp32", "bf16"] = "fp32"
    micro: int = 2
    """Largest number of examples in a micro-batch. A step has GLOBAL_BATCH examples."""
    decay: float = 0.0
    clipping: float = 1.0
    recompute: bool = False
    lora_plus_ratio: float = 1.0
    rate: float = RATE
    quantization: Literal["NF4"] | None = None
    offload: bool = False
    """Whether DeepSpeed keeps the optimizer's state in the memory of the host."""
    infinite: int | None = None
    """The step in which one micro-batch has an infinite loss, so that the step is discarded."""

    @property
    def name(self) -> str:
        """A name for files, which no other run has."""
        parts = "-".join(f"{kind}x{steps}" for kind, steps in self.parts)
        options = (
            self.micro,
            self.decay,
            self.clipping,
            self.recompute,
            self.lora_plus_ratio,
            self.rate,
            self.quantization,
            self.offload,
            self.infinite,
        )
        return "-".join(map(str, (self.method, self.precision, parts, *options)))

    def optimization(self, kind: Kind) -> OptimizationConfig:
        """Return the settings of the engine ``kind``."""
        return OptimizationConfig(
            learning_rate=self.rate,
            global_batch_size=GLOBAL_BATCH,
            micro_batch_size=self.micro,
            schedule="Constant",
            warmup_steps=0,
            weight_decay=self.decay,
            gradient_clipping=self.clipping,
            precision=self.precision,
            gradient_checkpointing=self.recompute,
            seed=42,
            zero_stage=0 if kind == PLAIN else kind,
            offload_optimizer=self.offload and kind != PLAIN,
        )


class Figures(BaseModel):
    """The loss (nats a token) and the gradient norm of each step. The norm of a discarded step is NaN."""

    losses: list[float]
    norms: list[float]
    passes: float = 0.0
    """How often the last step reads or writes a number of 4 bytes for each trained parameter, beside large products and
    attention."""
    own_norms: int = 0
    """How many gradient norms of parameter groups DeepSpeed computes in the last step."""


def load(run: EngineRun, folder: Path) -> torch.nn.Module:
    """Return the model of ``run`` as the trainer loads it. ``folder`` has the base model."""
    from finetune_trainer.model.adapters import add_adapters
    from finetune_trainer.model.load import DTYPES, enable_gradient_checkpointing, load_base
    from tests.trainer.plain_loop import DENSE

    model = load_base(folder, DTYPES[run.precision], quantization=run.quantization)
    if run.recompute:
        enable_gradient_checkpointing(model)
    if run.method == "Full":
        return model
    return add_adapters(
        model, LoRASpec(rank=4, alpha=8, quantization=run.quantization), targets=DENSE, seed=42, base_name="tiny"
    )


def make_engine(run: EngineRun, kind: Kind, model: torch.nn.Module) -> TrainingEngine:
    """Return the engine ``kind`` of ``model``. A process group is needed for DeepSpeed only."""
    import torch

    from finetune_trainer.engine.engine import Engine
    from finetune_trainer.engine.plain_engine import PlainEngine

    device, optimization = torch.device("cpu"), run.optimization(kind)
    if kind == PLAIN:
        return PlainEngine(model, optimization, device, lora_plus_ratio=run.lora_plus_ratio)
    return Engine(model, optimization, device, lora_plus_ratio=run.lora_plus_ratio)


def micro_batcher(folder: Path) -> MicroBatcher:
    """Return the micro-batches of the tests' rows, tokenised with the tokenizer in ``folder``."""
    from transformers import AutoTokenizer

    from finetune_trainer.data.examples import Example, example_set
    from finetune_trainer.data.micro_batches import MicroBatcher
    from tests.trainer import tiny

    tokenizer = AutoTokenizer.from_pretrained(folder)
    examples = []
    for row in tiny.rows(ROWS, seed=1):
        prompt = tokenizer(tiny.TEMPLATE.replace("{prompt}", row["question"]))["input_ids"]
        ids = [*prompt, *tokenizer(row["reply"])["input_ids"], tokenizer.eos_token_id]
        examples.append(Example(ids, [(len(prompt), len(ids))]))
    return MicroBatcher(example_set(examples), rank=0, world_size=1, pad=tokenizer.eos_token_id, capacity=None, seed=42)


def one_step(engine: TrainingEngine, batches: MicroBatcher, run: EngineRun, step: int) -> tuple[float, float]:
    """Make one optimizer step as `TrainingLoop` does. Return its loss and its gradient norm, NaN where the step was
    discarded."""
    plan = batches.plan_step(step, run.optimization(PLAIN))
    total = 0.0
    for index, batch in enumerate(batches.tensors(plan, step=step), 1):
        loss = engine.loss(batch, factor=1 / plan.tokens)
        total += float(loss.detach())
        factor = math.inf if run.infinite == step and index == 1 else 1 / plan.tokens
        engine.backward(loss * factor, last=index == len(plan.micro_batches))
    norm = engine.gradient_norm()
    if math.isnan(norm):
        engine.discard_gradient()
    else:
        engine.step(run.rate)
    return total / plan.tokens, norm


def train(run: EngineRun, model_folder: Path, scratch: Path) -> Figures:
    """Make the training ``run``. The state after each part is left in the folders `state_folder` of ``scratch``."""
    from finetune_trainer.engine.state import load_state, load_weights, take_snapshot, write_snapshot
    from finetune_trainer.model.load import trained_parameters
    from tests.trainer.kernel_counts import Counting

    batches = micro_batcher(model_folder)
    losses: list[float] = []
    norms: list[float] = []
    updates, passes = 0, 0.0
    own_norms = Counter[str]()
    for part, (kind, steps) in enumerate(run.parts):
        model = load(run, model_folder)
        if part:
            load_weights(trained_parameters(model), state_folder(run, scratch, part - 1))
        engine = make_engine(run, kind, model)
        count_norms(engine, own_norms)
        engine.train()
        if part:
            load_state(engine, state_folder(run, scratch, part - 1), updates=updates)
        for _ in range(steps):
            own_norms.clear()
            with Counting(tokens=1) as counted:
                loss, norm = one_step(engine, batches, run, len(losses) + 1)
            passes = counted.moved / 4 / sum(math.prod(shape) for shape in engine.parameter_shapes.values())
            losses.append(loss)
            norms.append(norm)
            updates += not math.isnan(norm)
        folder = state_folder(run, scratch, part)
        folder.mkdir(parents=True)
        write_snapshot(take_snapshot(engine, rank=0, world_size=1), folder, rank=0, world_size=1)
        engine.close()
    return Figures(losses=losses, norms=norms, passes=passes, own_norms=own_norms.total())


def count_norms(engine: TrainingEngine, calls: Counter[str]) -> None:
    """From now on count in ``calls`` how often DeepSpeed computes the gradient norm of a parameter group."""
    optimizer = getattr(engine, "_optimizer", None)
    for name in ("get_grad_norm_direct", "complete_grad_norm_calculation_for_cpu_offload"):
        compute = getattr(optimizer, name, None)
        if compute is None:
            continue

        def counted(*arguments: Any, name: str = name, compute: Any = compute, **options: Any) -> Any:
            calls[name] += 1
            return compute(*arguments, **options)

        setattr(optimizer, name, counted)


def state_folder(run: EngineRun, scratch: Path, part: int) -> Path:
    """Return the folder with the training state after the part with the number ``part`` of ``run``."""
    return scratch / f"{run.name}-{part}"


def state_after(run: EngineRun, scratch: Path) -> dict[str, torch.Tensor]:
    """Return the training state at the end of ``run``, by parameter and kind."""
    from safetensors.torch import load_file

    state: dict[str, torch.Tensor] = load_file(state_folder(run, scratch, len(run.parts) - 1) / STATE_FILE)
    return state


def assert_same_state(found: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor]) -> None:
    """Assert that names, order, types and bits of two stored states are the same."""
    import torch

    assert list(found) == list(wanted)
    for key, value in found.items():
        assert value.dtype == wanted[key].dtype == torch.float32
        assert torch.equal(value.view(torch.int32), wanted[key].view(torch.int32)), key


def main() -> None:
    asked = json.loads(Path(sys.argv[1]).read_text())
    scratch = Path(asked["scratch"])
    process.prepare_environment(scratch)
    import torch

    from finetune_trainer.ranks.gang import Gang

    gang = Gang(device=torch.device("cpu"))
    figures = [
        train(EngineRun.model_validate(run), Path(asked["model"]), scratch).model_dump() for run in asked["runs"]
    ]
    (scratch / "figures.json").write_text(json.dumps(figures))
    gang.final_barrier()
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
