"""The plain engine: forward, backward and update of a model in one process, with torch alone.

The plain engine has the interface of the DeepSpeed engine (`interface.py`), makes the same updates, and reads and
writes the same training state, so an attempt can resume with either engine. DeepSpeed's engine shards its tensors, and
therefore copies gradients into flat buffers. In one process nothing can be sharded, and the copies cost memory and
time.

Bytes a trained parameter in bf16, from the first backward pass of a step to its update:

- 2 for the weight,
- 2 for its remainder, which makes an exact fp32 value of the weight (see `masters.py`),
- 8 for AdamW's two moments in fp32,
- 4 for the gradient, which is accumulated in fp32 over all micro-batches,

together 16, and 12 between an update and the next backward pass. In fp32 the weight is the fp32 value, and the sum is
16 too. In addition there are the gradient of a single parameter in bf16 while it is computed, and temporary tensors of
a bounded size: 16 MiB for small gradients, 176 MiB in the update, of which 16 MiB for each parameter group stay until
the next one, and 32 MiB for the norm, which is computed once for each step. With a whole fp32 value of 4 bytes beside
the weight the sum would be 18. DeepSpeed holds such a value, and copies of gradients too: it
takes 24 bytes at ZeRO stage 1, and 20 at stage 2.

`choice.py` makes this engine where a job asks for no ZeRO stage.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist

from finetune_core.contract import OptimizationConfig
from finetune_trainer.data.batches import Batch
from finetune_trainer.engine.engine import RATE_FACTOR, parameter_groups
from finetune_trainer.engine.fragments import Fragment
from finetune_trainer.engine.gradient_norm import clipping_factor
from finetune_trainer.engine.masters import Bf16Masters, Fp32Masters, Masters
from finetune_trainer.engine.state import STATE_KINDS
from finetune_trainer.kernels.install import use_fused_kernels
from finetune_trainer.kernels.parts import KernelPart
from finetune_trainer.loss.objective import Objective
from finetune_trainer.model.attention import IMPLEMENTATIONS, Kernel
from finetune_trainer.model.load import trained_parameters
from finetune_trainer.model.packed_attention import note_borders


class PlainEngine:
    """A model with its optimizer, in one process."""

    def __init__(
        self,
        model: torch.nn.Module,
        optimization: OptimizationConfig,
        device: torch.device,
        *,
        lora_plus_ratio: float = 1.0,
        plain_kernels: Collection[KernelPart] = (),
    ) -> None:
        """Move ``model`` to ``device``. No process group is needed. Raises ValueError in a process group of several
        ranks, where each rank would train a model of its own.

        ``lora_plus_ratio`` is the learning rate of the matrices B of adapters, and of all trained vectors, as a
        multiple of the job's learning rate. The settings of ``optimization`` for DeepSpeed (ZeRO stage, offload,
        overrides) have no effect. ``plain_kernels`` are the parts of a step that compute without the trainer's own
        kernels.
        """
        if dist.is_initialized() and dist.get_world_size() > 1:
            raise ValueError(f"the plain engine trains in one process, and this training has {dist.get_world_size()}")
        self._clipping = optimization.gradient_clipping
        self._norm: float | None = None
        self.device = device
        is_bf16 = optimization.precision == "bf16"
        if is_bf16:
            # The code of a few models keeps some parameters in fp32. DeepSpeed converts them too.
            for parameter in model.parameters():
                if parameter.dtype in (torch.float16, torch.float32):
                    parameter.data = parameter.data.to(torch.bfloat16)
        self._model: Any = model.to(device)
        # This comes before `Objective`, which replaces the forward function of the output head: no kernel is put into a
        # layer whose forward function is replaced.
        self.kernels = use_fused_kernels(model, plain=plain_kernels)
        self._objective = Objective(model, fused_head=KernelPart.HEAD_LOSS not in plain_kernels)
        self._parameters = trained_parameters(model)
        names = {id(parameter): name for name, parameter in self._parameters.items()}
        self._groups: list[tuple[Masters, float]] = []
        """For each parameter group of the optimizer its parameters, and a factor for their learning rate."""
        self._masters: dict[str, Masters] = {}
        kind = Bf16Masters if is_bf16 else Fp32Masters
        for group in parameter_groups(model, optimization.weight_decay, lora_plus_ratio=lora_plus_ratio):
            own = {names[id(parameter)]: parameter for parameter in group["params"]}
            masters: Masters = kind(own, weight_decay=group["weight_decay"])
            self._groups.append((masters, group.get(RATE_FACTOR, 1.0)))
            self._masters |= dict.fromkeys(own, masters)

    # Functions of an optimizer step

    def forward(self, **inputs: Any) -> Any:
        """Call the model with ``inputs``, the keyword arguments of its forward function, and return the model's
        output."""
        return self._model(**inputs)

    def loss(self, batch: Batch, *, factor: float = 1.0, full_logits: bool = False) -> torch.Tensor:
        """Return the summed negative log-likelihood (nats) of the supervised tokens of ``batch``, a scalar in fp32.

        ``factor`` is what the caller will multiply the loss by before `backward`, so that a head that computes its
        gradients in the forward pass rounds them as autograd does. With ``full_logits`` the logits of all
        positions are computed first, which is slow and takes much memory.
        """
        return self._objective.loss(self._model, batch, factor=factor, full_logits=full_logits)

    def use_full_logits(self) -> None:
        """From now on compute every loss from the logits of all positions, as `loss` does with ``full_logits``."""
        self._objective.full_logits = True

    def logits(self, batch: Batch) -> torch.Tensor:
        """Return the logits (N, vocabulary) at the N positions that predict a target of ``batch``."""
        return self._objective.logits(self._model, batch)

    @property
    def model(self) -> Any:
        """The transformers or peft model, which can generate texts."""
        return self._model

    @property
    def lockstep(self) -> bool:
        """Return False, because there is no other rank."""
        return False

    def exclude_tokens(self, ids: Sequence[int]) -> None:
        """From now on compute losses as if the tokens ``ids`` were not in the vocabulary. An empty list restores the
        vocabulary."""
        self._objective.exclude_tokens(torch.tensor(list(ids), device=self.device) if ids else None)

    def backward(self, loss: torch.Tensor, *, last: bool) -> None:
        """Accumulate the gradient of ``loss``. ``last`` has no effect, because no rank waits for the gradient."""
        del last
        self._norm = None
        loss.backward()
        for masters, _ in self._groups:
            masters.end_backward()

    def gradient_norm(self) -> float:
        """Return the L2 norm of the accumulated gradient, before clipping; NaN where the norm is not finite."""
        if self._norm is None:
            with torch.no_grad():
                norms = [masters.gradient_norm().to(self.device) for masters, _ in self._groups]
                norm = float(torch.linalg.vector_norm(torch.stack(norms)))
            self._norm = norm if math.isfinite(norm) else math.nan
        return self._norm

    def step(self, rate: float) -> None:
        """Clip the accumulated gradient and update the weights with the learning rate ``rate``. Do not call this
        function where `gradient_norm` is NaN."""
        factor = clipping_factor(self.gradient_norm(), self._clipping)
        with torch.no_grad():
            for masters, rate_factor in self._groups:
                masters.update(rate * rate_factor, gradient_factor=factor)
        self._norm = None

    def discard_gradient(self) -> None:
        """Drop the accumulated gradient, so that no update is made with it."""
        for masters, _ in self._groups:
            masters.drop_gradient()
        self._norm = None

    def close(self) -> None:
        """Free weights, gradients and optimizer state. The engine can't be used afterwards."""
        for masters, _ in self._groups:
            masters.close()
        del self._model, self._objective
        self._groups, self._masters, self._parameters = [], {}, {}
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def train(self, mode: bool = True) -> None:
        """Switch the model to training mode, or to evaluation mode without dropout."""
        self._model.train(mode)
        # Forget the borders of the last micro-batch. Text is generated without an `Objective`, which would note the
        # borders of each batch.
        note_borders(None)

    def use_attention(self, kernel: Kernel) -> None:
        """From now on compute attention with ``kernel``. Raises ValueError or ImportError where the model's code does
        not support the kernel."""
        inner = self._model.get_base_model() if hasattr(self._model, "get_base_model") else self._model
        inner.set_attn_implementation(IMPLEMENTATIONS[kernel])

    # Functions that read and write the training state, for checkpoints

    @property
    def parameter_shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shapes of the trained parameters by name, in the model's order."""
        return {name: tuple(parameter.shape) for name, parameter in self._parameters.items()}

    def read_state(self, name: str) -> dict[str, torch.Tensor]:
        """Return the fp32 value and AdamW's two moments of the trained parameter ``name``."""
        with torch.no_grad():
            return {kind: self._masters[name].read(name, kind) for kind in STATE_KINDS}

    def read_fragment(self, name: str, kind: str) -> Fragment:
        """Return the whole fp32 value of the trained parameter ``name``, or the whole moment that ``kind`` names, as a
        fragment. There is no other rank that holds a part."""
        with torch.no_grad():
            return Fragment(0, self._masters[name].read(name, kind).reshape(-1))

    def prepare_state(self, updates: int) -> None:
        """Set the optimizer's state to that after ``updates`` updates, so that `write_state` can fill it."""
        for masters, _ in self._groups:
            masters.reset(updates)

    def write_state(self, name: str, tensors: Mapping[str, torch.Tensor]) -> None:
        """Set the fp32 value and the two moments of the trained parameter ``name`` to ``tensors``, as `read_state`
        returned them. The weight that the model computes with is set too."""
        with torch.no_grad():
            self._masters[name].write(name, tensors)

    def write_weight(self, name: str, value: torch.Tensor) -> None:
        """Set the weight that the model computes with to ``value``, an fp32 tensor of a checkpoint.

        The optimizer's state does not change. So training can't go on after this call.
        """
        self._parameters[name].data.copy_(value)
