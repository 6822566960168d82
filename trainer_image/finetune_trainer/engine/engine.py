"""The DeepSpeed engine without run-time compilation, and the little that the trainer needs of its inside.

Everything here that depends on DeepSpeed's internals is in this module, so that an upgrade touches one file.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from finetune_core.contract import OptimizationConfig
from finetune_trainer.data.batches import Batch
from finetune_trainer.engine.config import engine_config, prevent_compilation
from finetune_trainer.loss.kernels import fuse_adapters
from finetune_trainer.loss.objective import Objective
from finetune_trainer.model.load import trained_parameters

BETAS = (0.9, 0.999)
EPSILON = 1e-8
MASTER, FIRST_MOMENT, SECOND_MOMENT = "master", "exp_avg", "exp_avg_sq"
"""The three tensors of a trained parameter: fp32 value, and AdamW's moments under torch's names."""


class Engine:
    """A model with its optimizer, sharded by DeepSpeed."""

    def __init__(self, model: torch.nn.Module, optimization: OptimizationConfig, device: torch.device) -> None:
        """Shard ``model`` over the ranks of the default process group; a collective."""
        import deepspeed
        from deepspeed.utils import set_z3_leaf_module

        prevent_compilation()
        if optimization.zero_stage < 3:
            # Before the objective, which takes over what the head computes, be it adapted or not.
            fuse_adapters(model)
        self._objective = Objective(model)
        if self._objective.head is not None:
            # Gathered once a micro-batch however many chunks it computes: ranks may differ in that.
            set_z3_leaf_module(self._objective.head, True)
        self._stage = optimization.zero_stage
        self._linked = False
        self._optimization = optimization
        self.device = device
        optimizer = torch.optim.AdamW(
            _parameter_groups(model, optimization.weight_decay),
            lr=optimization.learning_rate,
            betas=BETAS,
            eps=EPSILON,
            # One pass over the state instead of ten: it does not fit into any cache.
            fused=True,
        )
        self.module, self._zero, _, _ = deepspeed.initialize(
            model=model,
            optimizer=optimizer,
            config=engine_config(optimization, torch.distributed.get_world_size()),
            dist_init_required=False,
        )
        self._names = trained_parameters(model)

    # Steps

    def forward(self, **inputs: Any) -> Any:
        """Run the model."""
        return self.module(**inputs)

    def loss(self, batch: Batch, *, whole_logits: bool = False) -> torch.Tensor:
        """Return the summed negative log-likelihood (nats) of the batch's supervised tokens, in fp32.

        ``whole_logits`` computes the logits of all positions first, which is slow and takes much memory.
        """
        return self._objective.loss(self.module, batch, whole_logits=whole_logits)

    def use_whole_logits(self) -> None:
        """Compute every loss with ``whole_logits`` from now on."""
        self._objective.whole_logits = True

    def logits(self, batch: Batch) -> torch.Tensor:
        """Return the logits (N, vocabulary) that predict the batch's targets."""
        return self._objective.logits(self.module, batch)

    @property
    def model(self) -> Any:
        """The model itself, which can generate; under ZeRO-3 its layers gather their weights as they compute."""
        return self.module.module

    @property
    def lockstep(self) -> bool:
        """Whether all ranks have to run equally many forward passes: each gathers weights from all of them."""
        return self._stage == 3 and torch.distributed.get_world_size() > 1

    def hide_tokens(self, ids: Sequence[int]) -> None:
        """Compute losses as if the vocabulary were without the tokens ``ids``; with none, with all of it again."""
        self._objective.hide(torch.tensor(list(ids), device=self.device) if ids else None)

    def backward(self, loss: torch.Tensor, *, last: bool) -> None:
        """Accumulate gradients of ``loss``; DeepSpeed averages them over the ranks, so the caller scales by their
        number. ``last`` says that the global batch is complete."""
        self.module.set_gradient_accumulation_boundary(last)
        self.module.backward(loss, scale_wrt_gas=False)
        if not last:
            self.module.step()

    def gradient_norm(self) -> float:
        """Return the norm of the accumulated gradient over all ranks before clipping, NaN where it is not finite.

        Before `step`, because DeepSpeed hides what it skipped, and stage 0 in fp32 would apply it. A collective.
        """
        if self._stage == 0:
            gradients = [parameter.grad for parameter in self._names.values() if parameter.grad is not None]
            norm = float(torch.nn.utils.get_total_norm(gradients))
        elif self._stage == 3:
            from deepspeed.runtime.utils import combine_grad_norm_groups

            norm = float(combine_grad_norm_groups(self._zero._get_norm_groups()))
        else:
            norm = float(self._zero.scaled_global_norm())
        # DeepSpeed reports a norm that is not finite as -1.
        return norm if math.isfinite(norm) and norm >= 0 else math.nan

    def step(self, rate: float) -> None:
        """Clip and apply the accumulated gradient with learning rate ``rate``; a collective."""
        for group in self._zero.param_groups:
            group["lr"] = rate
        self.module.step()
        self._link_moments()

    def discard(self) -> None:
        """Forget the accumulated gradient: the step is left out."""
        self._zero.zero_grad()
        if self._stage == 0:
            return
        if self._stage == 3:
            self._zero._overflow_clean_up(self._zero.loss_scale)
            return
        # What DeepSpeed itself does with a gradient that overflows (stage_1_and_2.py, step).
        if self._zero.cpu_offload:
            self._zero.reset_cpu_buffers()
        for group in self._zero.averaged_gradients:
            self._zero.averaged_gradients[group] = None
            self._zero.all_grad_tensors[group] = None

    def close(self) -> None:
        """Free what holds weights, gradients and optimizer state; the engine can't be used any more."""
        self.module.destroy()
        del self.module, self._zero, self._objective
        self._names = {}
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def train(self, mode: bool = True) -> None:
        """Switch dropout on or off."""
        self.module.train(mode)

    # State

    @property
    def names(self) -> Mapping[str, tuple[int, ...]]:
        """Shapes of the trained parameters by name, in the model's order: the same on every rank."""
        return {name: tuple(full_shape(parameter)) for name, parameter in self._names.items()}

    def read_state(self, name: str) -> dict[str, torch.Tensor]:
        """Return the full fp32 value and moments of a trained parameter; a collective."""
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        parameter = self._names[name]
        if self._stage == 0:
            state = self._zero.state[parameter]
            return {MASTER: parameter.detach(), **{key: state[key] for key in (FIRST_MOMENT, SECOND_MOMENT)}}
        tensors = {MASTER: safe_get_full_fp32_param(parameter)}
        for key in (FIRST_MOMENT, SECOND_MOMENT):
            tensors[key] = safe_get_full_optimizer_state(parameter, key)
        return tensors

    def _link_moments(self) -> None:
        """Let parameters find their moments after the first update, at ZeRO 1 and 2.

        DeepSpeed does so when the first of the optimizer's groups was updated, and the others have no moments yet.
        """
        if self._stage in (1, 2) and not self._linked:
            self._zero._hp_optimizer_states_linked = False
            self._zero._lazy_init_hp_params_optimizer_state()
            self._linked = True

    def prepare_state(self, updates: int) -> None:
        """Create the optimizer's state as after ``updates`` updates, so that `write_state` can fill it.

        torch creates it at the first update only.
        """
        inner = self._zero if self._stage == 0 else self._zero.optimizer
        shards = (
            self._zero.fp32_partitioned_groups_flat
            if self._stage == 3
            else [parameter for group in inner.param_groups for parameter in group["params"]]
        )
        for shard in shards:
            inner.state[shard] = {
                "step": torch.tensor(float(updates), device=shard.device),
                FIRST_MOMENT: torch.zeros_like(shard),
                SECOND_MOMENT: torch.zeros_like(shard),
            }
        if self._stage in (1, 2):
            self._zero._lazy_init_hp_params_optimizer_state()

    def write_state(self, name: str, tensors: Mapping[str, torch.Tensor]) -> None:
        """Set what `read_state` returned; the model's own copy in bf16 was loaded before the engine was made."""
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        parameter = self._names[name]
        if self._stage == 0:
            parameter.data.copy_(tensors[MASTER])
            for key in (FIRST_MOMENT, SECOND_MOMENT):
                self._zero.state[parameter][key].copy_(tensors[key])
            return
        safe_set_full_fp32_param(parameter, tensors[MASTER].to(self.device))
        for key in (FIRST_MOMENT, SECOND_MOMENT):
            safe_set_full_optimizer_state(parameter, tensors[key].to(self.device), key)

    def write_weight(self, name: str, value: torch.Tensor) -> None:
        """Set the weight that the model computes with to ``value``, as a checkpoint holds it; a collective.

        The optimizer's own copy stays: training can't go on after it.
        """
        import deepspeed

        parameter = self._names[name]
        if self._stage < 3:
            parameter.data.copy_(value)
            return
        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
            if torch.distributed.get_rank() == 0:
                parameter.data.copy_(value)


def full_shape(parameter: torch.nn.Parameter) -> torch.Size:
    """Return the shape of a parameter, of which this rank may hold a shard only."""
    return getattr(parameter, "ds_shape", parameter.shape)


def assign(parameter: torch.nn.Parameter, value: torch.Tensor) -> None:
    """Set a parameter of the model before the engine is made; a collective where it is sharded."""
    if not hasattr(parameter, "ds_shape"):
        parameter.copy_(value)
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
        if torch.distributed.get_rank() == 0:
            parameter.copy_(value)


def _parameter_groups(model: torch.nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Return the optimizer's groups: matrices decay, vectors (norms, biases) don't, as in GPT-3 and Llama.

    Told apart by their full shapes: of a model that was built sharded each tensor itself is empty and a vector.
    """
    parameters = list(trained_parameters(model).values())
    if weight_decay == 0:
        return [{"params": parameters, "weight_decay": 0.0}]
    groups = [
        {"params": [p for p in parameters if len(full_shape(p)) >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if len(full_shape(p)) < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
