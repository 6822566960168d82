"""The DeepSpeed engine: forward, backward and update of a model that is sharded over the ranks, and access to its
training state.

`train.py` makes one engine for each run. All code that depends on DeepSpeed's internals is in this module, in
`fragments.py`, in `leaf_modules.py` and in `config.py`, so that an upgrade of DeepSpeed changes only these four files.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from finetune_core.contract import OptimizationConfig
from finetune_trainer.data.batches import Batch
from finetune_trainer.engine.config import engine_clips, engine_config, overlap_pays, prevent_compilation
from finetune_trainer.engine.fragments import Fragment, own_fragment
from finetune_trainer.engine.gradient_norm import clipping_factor, sum_of_squares
from finetune_trainer.engine.leaf_modules import make_leaf_modules
from finetune_trainer.kernels.install import use_fused_kernels
from finetune_trainer.kernels.parts import NOT_UNDER_ZERO_3, KernelPart
from finetune_trainer.loss.objective import Objective
from finetune_trainer.model.attention import IMPLEMENTATIONS, Kernel
from finetune_trainer.model.load import trained_parameters
from finetune_trainer.model.packed_attention import note_borders
from finetune_trainer.ranks.device_environment import overlaps_communication

BETAS = (0.9, 0.999)
EPSILON = 1e-8
"""AdamW's betas and epsilon: the defaults of torch and of the transformers Trainer."""
RATE_FACTOR = "rate_factor"
"""Key of a parameter group of the optimizer. The value under the key is a factor for the learning rate of the group. A
group without the key has the factor 1."""
MASTER, FIRST_MOMENT, SECOND_MOMENT = "master", "exp_avg", "exp_avg_sq"
"""Names of the three tensors that each trained parameter has: its fp32 value, and AdamW's two moments under torch's
names."""


class Engine:
    """A model with its optimizer, sharded over the ranks by DeepSpeed."""

    def __init__(
        self,
        model: torch.nn.Module,
        optimization: OptimizationConfig,
        device: torch.device,
        *,
        lora_plus_ratio: float = 1.0,
        plain_kernels: Collection[KernelPart] = (),
    ) -> None:
        """Shard ``model`` over the ranks of torch's default process group. All ranks must make their engine together.
        Raises ValueError where ``optimization`` asks for no ZeRO stage.

        ``lora_plus_ratio`` is the learning rate of the matrices B of adapters, and of all trained vectors, as a
        multiple of the job's learning rate. ``plain_kernels`` are the parts of a step that compute without the
        trainer's own kernels.
        """
        import deepspeed

        prevent_compilation()
        if optimization.zero_stage is None:
            raise ValueError("DeepSpeed's engine needs a ZeRO stage")
        self._stage = optimization.zero_stage
        plain = frozenset(plain_kernels)
        if self._stage == 3:
            plain |= NOT_UNDER_ZERO_3
        else:
            # DeepSpeed moves the model later. A large model computes its two tokens faster on a GPU.
            model.to(device)
        # This comes before `Objective`, which replaces the forward function of the output head: no kernel is put into a
        # layer whose forward function is replaced.
        self.kernels = use_fused_kernels(model, plain=plain)
        self._objective = Objective(model, fused_head=KernelPart.HEAD_LOSS not in plain)
        if self._stage == 3:
            make_leaf_modules(model, self._objective.head)
        self._clipping = optimization.gradient_clipping if engine_clips(optimization) else None
        self._norm: float | None = None
        self._norm_answer: tuple[str, Any] | None = None
        """Where DeepSpeed clips: name and result of its function that has computed `_norm`."""
        self.device = device
        optimizer = torch.optim.AdamW(
            parameter_groups(model, optimization.weight_decay, lora_plus_ratio=lora_plus_ratio),
            lr=optimization.learning_rate,
            betas=BETAS,
            eps=EPSILON,
            # The fused kernel is used, because it reads the optimizer state from memory once instead of ten times, and
            # the state is too large for any cache.
            fused=True,
        )
        if self._clipping is not None:
            optimizer.register_step_pre_hook(self._clip)
        ranks = torch.distributed.get_world_size()
        self._parameters = trained_parameters(model)
        trained = sum(math.prod(full_shape(parameter)) for parameter in self._parameters.values())
        overlap = overlaps_communication("GPU" if device.type == "cuda" else "CPU", ranks=ranks)
        self.module, self._optimizer, _, _ = deepspeed.initialize(
            model=model,
            optimizer=optimizer,
            config=engine_config(
                optimization, ranks, overlap_communication=overlap and overlap_pays(self._stage, trained)
            ),
            dist_init_required=False,
        )
        # Otherwise torch creates the moments at the first update, and a checkpoint of a run whose first steps were not
        # applied could not be taken.
        self.prepare_state(0)

    # Functions of an optimizer step

    def forward(self, **inputs: Any) -> Any:
        """Call the model with ``inputs``, the keyword arguments of its forward function, and return the model's
        output."""
        return self.module(**inputs)

    def loss(self, batch: Batch, *, factor: float = 1.0, full_logits: bool = False) -> torch.Tensor:
        """Return the summed negative log-likelihood (nats) of the supervised tokens of ``batch``, a scalar in fp32.

        ``factor`` is what the caller will multiply the loss by before `backward`, so that a head that computes its
        gradients in the forward pass rounds them as autograd does. With ``full_logits`` the logits of all
        positions are computed first, which is slow and takes much memory. An empty micro-batch gives a zero through
        which gradients flow, so that every rank runs the same backward pass.
        """
        return self._objective.loss(self.module, batch, factor=factor, full_logits=full_logits)

    def use_full_logits(self) -> None:
        """From now on compute every loss from the logits of all positions, as `loss` does with ``full_logits``."""
        self._objective.full_logits = True

    def logits(self, batch: Batch) -> torch.Tensor:
        """Return the logits (N, vocabulary) at the N positions that predict a target of ``batch``."""
        return self._objective.logits(self.module, batch)

    @property
    def model(self) -> Any:
        """The transformers or peft model, which can generate texts. Under ZeRO-3 each layer gathers its weights when it
        computes."""
        return self.module.module

    @property
    def lockstep(self) -> bool:
        """Return whether all ranks must run the same number of forward passes, because each pass gathers weights from
        all ranks."""
        return self._stage == 3 and torch.distributed.get_world_size() > 1

    def exclude_tokens(self, ids: Sequence[int]) -> None:
        """From now on compute losses as if the tokens ``ids`` were not in the vocabulary. An empty list restores the
        vocabulary."""
        self._objective.exclude_tokens(torch.tensor(list(ids), device=self.device) if ids else None)

    def backward(self, loss: torch.Tensor, *, last: bool) -> None:
        """Accumulate the gradient of ``loss``. DeepSpeed averages gradients over the ranks. To get the sum, the caller
        multiplies ``loss`` by the number of ranks. ``last`` marks the last micro-batch of the global batch."""
        self._norm = None
        self.module.set_gradient_accumulation_boundary(last)
        self.module.backward(loss, scale_wrt_gas=False)
        if not last:
            self.module.step()

    def gradient_norm(self) -> float:
        """Return the L2 norm of the accumulated gradient over all ranks, before clipping; NaN where the norm is not
        finite. All ranks must call this function together.

        Call this function before `step`, and do not call `step` where the norm is NaN. DeepSpeed would skip such an
        update without a report, and at stage 0 in fp32 it would apply the update.
        """
        if self._norm is None:
            norm = self._total_norm()
            # DeepSpeed returns -1 for a norm that is not finite.
            self._norm = norm if math.isfinite(norm) and norm >= 0 else math.nan
        return self._norm

    def _total_norm(self) -> float:
        if self._stage == 0:
            gradients = [parameter.grad for parameter in self._parameters.values() if parameter.grad is not None]
            return float(torch.nn.utils.get_total_norm(gradients))
        if self._stage == 3:
            from deepspeed.runtime.utils import combine_grad_norm_groups

            groups = self._optimizer._get_norm_groups()
            self._norm_answer = "_get_norm_groups", groups
            return float(combine_grad_norm_groups(groups))
        if self._clipping is None:
            norm = self._optimizer.scaled_global_norm()
            self._norm_answer = "scaled_global_norm", norm
            return float(norm)
        with torch.no_grad():
            # The order of the groups decides how the norm is rounded. The dictionary has another order.
            gradients = sorted(self._optimizer.averaged_gradients.items())
            # The sum over no values is on the CPU: a rank may hold no part of a small group.
            squares = torch.stack([sum_of_squares(own).to(self.device) for _, own in gradients])
            if torch.distributed.get_world_size() > 1:
                torch.distributed.all_reduce(squares)
            return float(torch.linalg.vector_norm(squares.sqrt()))

    def step(self, rate: float) -> None:
        """Clip the accumulated gradient and update the weights with the learning rate ``rate``. All ranks must call
        this function together."""
        if self._clipping is not None:
            # All ranks compute the norm together, and only ranks that hold a gradient call `_clip`.
            self.gradient_norm()
        for group in self._optimizer.param_groups:
            group["lr"] = rate * group.get(RATE_FACTOR, 1.0)
        with self._known_norm():
            self.module.step()
        self._norm = None

    @contextmanager
    def _known_norm(self) -> Iterator[None]:
        """Inside the block, DeepSpeed clips with the norm that `gradient_norm` has let it compute, if it has. DeepSpeed
        would compute the norm a second time from the same gradients, and exchange it between the ranks again."""
        if self._norm is None or self._norm_answer is None:
            yield
            return
        name, answer = self._norm_answer
        # An attribute of the object hides the method of its class.
        setattr(self._optimizer, name, lambda: answer)
        try:
            yield
        finally:
            delattr(self._optimizer, name)

    def _clip(self, optimizer: torch.optim.Optimizer, _arguments: object, _options: object) -> None:
        """Clip the gradient before ``optimizer`` makes its update. DeepSpeed has made the gradient of this rank's shard
        in fp32."""
        assert self._clipping is not None
        factor = clipping_factor(self.gradient_norm(), self._clipping)
        if factor != 1:
            for group in optimizer.param_groups:
                for shard in group["params"]:
                    shard.grad.mul_(factor)

    def discard_gradient(self) -> None:
        """Drop the accumulated gradient, so that no update is made with it."""
        from deepspeed.runtime.zero.stage_1_and_2 import INITIAL_MICRO_STEP_ID

        self._norm = None
        self._optimizer.zero_grad()
        if self._stage == 0:
            return
        if self._stage == 3:
            self._optimizer._overflow_clean_up(self._optimizer.loss_scale)
            return
        # Clear what DeepSpeed clears when a gradient overflows (`step` in deepspeed/runtime/zero/stage_1_and_2.py).
        if self._optimizer.cpu_offload:
            self._optimizer.reset_cpu_buffers()
            # Otherwise the first micro-batch of the next step would add its gradient to the dropped one, which is still
            # in CPU memory.
            self._optimizer.micro_step_id = INITIAL_MICRO_STEP_ID
        for group in self._optimizer.averaged_gradients:
            self._optimizer.averaged_gradients[group] = None
            self._optimizer.all_grad_tensors[group] = None

    def close(self) -> None:
        """Free weights, gradients and optimizer state. The engine can't be used afterwards."""
        self.module.destroy()
        del self.module, self._optimizer, self._objective
        self._parameters = {}
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def train(self, mode: bool = True) -> None:
        """Switch the model to training mode, or to evaluation mode without dropout."""
        self.module.train(mode)
        # Forget the borders of the last micro-batch. Text is generated without an `Objective`, which would note the
        # borders of each batch.
        note_borders(None)

    def use_attention(self, kernel: Kernel) -> None:
        """From now on compute attention with ``kernel``. Raises ValueError or ImportError where the model's code does
        not support the kernel."""
        inner = self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model
        inner.set_attn_implementation(IMPLEMENTATIONS[kernel])

    # Functions that read and write the training state, for checkpoints

    @property
    def parameter_shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shapes of the trained parameters before sharding, by name, in the model's order, which is the same on every
        rank."""
        return {name: tuple(full_shape(parameter)) for name, parameter in self._parameters.items()}

    def read_state(self, name: str) -> dict[str, torch.Tensor]:
        """Return the fp32 value and AdamW's two moments of the trained parameter ``name``, gathered from the shards of
        all ranks. All ranks must call this function together."""
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        parameter = self._parameters[name]
        if self._stage == 0:
            state = self._optimizer.state[parameter]
            return {MASTER: parameter.detach(), **{key: state[key] for key in (FIRST_MOMENT, SECOND_MOMENT)}}
        tensors = {MASTER: safe_get_full_fp32_param(parameter)}
        for key in (FIRST_MOMENT, SECOND_MOMENT):
            tensors[key] = safe_get_full_optimizer_state(parameter, key)
        return tensors

    def read_fragment(self, name: str, kind: str) -> Fragment:
        """Return the part that this rank holds of the trained parameter ``name``: of its fp32 value or of one of
        AdamW's two moments, as ``kind`` says. The call communicates with no other rank."""
        return own_fragment(
            self._parameters[name],
            self._optimizer,
            stage=self._stage,
            rank=torch.distributed.get_rank(),
            moment=None if kind == MASTER else kind,
        )

    def prepare_state(self, updates: int) -> None:
        """Set the optimizer's state to that after ``updates`` updates, so that `write_state` can fill it. torch would
        create the state only at the first update."""
        inner = self._optimizer if self._stage == 0 else self._optimizer.optimizer
        shards = (
            self._optimizer.fp32_partitioned_groups_flat
            if self._stage == 3
            else [parameter for group in inner.param_groups for parameter in group["params"]]
        )
        for shard in shards:
            state = inner.state[shard]
            if not state:
                state["step"] = torch.zeros((), device=shard.device)
                state |= {kind: torch.zeros_like(shard) for kind in (FIRST_MOMENT, SECOND_MOMENT)}
            # Tensors that exist are used again, because DeepSpeed has linked the parameters to them.
            state["step"].fill_(float(updates))
            for kind in (FIRST_MOMENT, SECOND_MOMENT):
                state[kind].zero_()
        if self._stage in (1, 2):
            # DeepSpeed links each parameter to its moments once. By itself it would do so in the first update, when the
            # groups behind the first one have no moments yet.
            self._optimizer._lazy_init_hp_params_optimizer_state()

    def write_state(self, name: str, tensors: Mapping[str, torch.Tensor]) -> None:
        """Set the fp32 value and the two moments of the trained parameter ``name`` to ``tensors``, as `read_state`
        returned them. At ZeRO stages 1 to 3 the weights that the model computes with are not set here, but by
        `load_weights` before the engine is made."""
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        parameter = self._parameters[name]
        if self._stage == 0:
            parameter.data.copy_(tensors[MASTER])
            for key in (FIRST_MOMENT, SECOND_MOMENT):
                self._optimizer.state[parameter][key].copy_(tensors[key])
            return
        if self._stage == 3:
            self._write_shard(parameter, tensors)
            return
        safe_set_full_fp32_param(parameter, tensors[MASTER].to(self.device))
        for key in (FIRST_MOMENT, SECOND_MOMENT):
            safe_set_full_optimizer_state(parameter, tensors[key].to(self.device), key)

    def _write_shard(self, parameter: torch.nn.Parameter, tensors: Mapping[str, torch.Tensor]) -> None:
        """Set this rank's shard of a parameter at ZeRO stage 3 to its part of ``tensors``, which are whole. DeepSpeed
        has a function for whole tensors, but the function fails where the number of values is no multiple of the number
        of ranks, because the last shard then has padding."""
        from deepspeed.utils import (
            safe_get_local_fp32_param,
            safe_set_local_fp32_param,
            safe_set_local_optimizer_state,
        )

        size, rank = safe_get_local_fp32_param(parameter).numel(), torch.distributed.get_rank()
        shards = {}
        for key, tensor in tensors.items():
            values = tensor.flatten()[rank * size : (rank + 1) * size]
            shards[key] = torch.nn.functional.pad(values, (0, size - values.numel())).to(self.device)
        safe_set_local_fp32_param(parameter, shards[MASTER])
        for key in (FIRST_MOMENT, SECOND_MOMENT):
            safe_set_local_optimizer_state(parameter, shards[key], key)

    def write_weight(self, name: str, value: torch.Tensor) -> None:
        """Set the weight that the model computes with to ``value``, an fp32 tensor of a checkpoint. All ranks must call
        this function together.

        The moments of AdamW do not change, and at ZeRO stages 1 to 3 the optimizer's fp32 value does not either. So
        training can't go on after this call.
        """
        import deepspeed

        parameter = self._parameters[name]
        if self._stage < 3:
            parameter.data.copy_(value)
            return
        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
            if torch.distributed.get_rank() == 0:
                parameter.data.copy_(value)


def full_shape(parameter: torch.nn.Parameter) -> torch.Size:
    """Return the shape of ``parameter`` before sharding. This rank may hold only a shard of the parameter."""
    return getattr(parameter, "ds_shape", parameter.shape)


def assign_parameter(parameter: torch.nn.Parameter, value: torch.Tensor) -> None:
    """Set a parameter of the model to ``value``, before the engine is made. Where the parameter is sharded, all ranks
    must call this function together."""
    if not hasattr(parameter, "ds_shape"):
        parameter.copy_(value)
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
        if torch.distributed.get_rank() == 0:
            parameter.copy_(value)


def parameter_groups(
    model: torch.nn.Module, weight_decay: float, *, lora_plus_ratio: float = 1.0
) -> list[dict[str, Any]]:
    """Return the optimizer's parameter groups: weight decay applies to matrices, and not to vectors such as norms and
    biases, as in GPT-3 and Llama.

    Where ``lora_plus_ratio`` is not 1 (LoRA+), the matrices B of adapters and all vectors are in groups of their own.
    `Engine.step` multiplies the learning rate of these groups by the ratio. peft's `create_loraplus_optimizer` trains
    the same parameters at the higher rate.

    The shape before sharding shows whether a parameter is a matrix. The shape of the tensor itself does not, because in
    a model that was built under ZeRO-3 each tensor is an empty vector.
    """
    parameters = trained_parameters(model)
    if weight_decay == 0 and lora_plus_ratio == 1:
        return [{"params": list(parameters.values()), "weight_decay": 0.0}]
    matrices = {name: value for name, value in parameters.items() if len(full_shape(value)) >= 2}
    vectors = [value for value in parameters.values() if len(full_shape(value)) < 2]
    if lora_plus_ratio == 1:
        groups = [
            {"params": list(matrices.values()), "weight_decay": weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ]
    else:
        fast = [value for name, value in matrices.items() if "lora_B" in name]
        slow = [value for name, value in matrices.items() if "lora_B" not in name]
        groups = [
            {"params": slow, "weight_decay": weight_decay},
            {"params": fast, "weight_decay": weight_decay, RATE_FACTOR: lora_plus_ratio},
            {"params": vectors, "weight_decay": 0.0, RATE_FACTOR: lora_plus_ratio},
        ]
    return [group for group in groups if group["params"]]
