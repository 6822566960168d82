"""What the trainer needs of a training engine, whatever library computes the updates.

`engine.py` (DeepSpeed) and `plain_engine.py` (one process, torch alone) have this interface. The modules that train,
score and save a model call nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch

from finetune_trainer.data.batches import Batch
from finetune_trainer.engine.fragments import Fragment
from finetune_trainer.kernels.install import KernelReport
from finetune_trainer.model.attention import Kernel


class TrainingEngine(Protocol):
    """A model with its optimizer. Where a training has several ranks, all of them must call each function together,
    except `model`, `device`, `kernels`, `lockstep`, `parameter_shapes`, `read_fragment` and the functions that only set
    an option."""

    @property
    def device(self) -> torch.device:
        """The device that the model computes on."""

    @property
    def model(self) -> Any:
        """The transformers or peft model, which can generate texts."""

    @property
    def kernels(self) -> KernelReport:
        """Which parts of the model train with the trainer's own kernels."""

    @property
    def lockstep(self) -> bool:
        """Return whether all ranks must run the same number of forward passes."""

    # Functions of an optimizer step

    def forward(self, **inputs: Any) -> Any:
        """Call the model with ``inputs``, the keyword arguments of its forward function, and return the model's
        output."""

    def loss(self, batch: Batch, *, factor: float = 1.0, full_logits: bool = False) -> torch.Tensor:
        """Return the summed negative log-likelihood (nats) of the supervised tokens of ``batch``, a scalar in fp32.
        ``factor`` is what the caller will multiply the loss by before `backward`. The loss and its gradients don't
        depend on ``factor``, but the rounding of the gradients does. With ``full_logits`` the
        logits of all positions are computed first. An empty micro-batch gives a zero through which gradients flow."""

    def use_full_logits(self) -> None:
        """From now on compute every loss from the logits of all positions, as `loss` does with ``full_logits``."""

    def logits(self, batch: Batch) -> torch.Tensor:
        """Return the logits (N, vocabulary) at the N positions that predict a target of ``batch``."""

    def exclude_tokens(self, ids: Sequence[int]) -> None:
        """From now on compute losses as if the tokens ``ids`` were not in the vocabulary. An empty list restores the
        vocabulary."""

    def train(self, mode: bool = True) -> None:
        """Switch the model to training mode, or to evaluation mode without dropout."""

    def use_attention(self, kernel: Kernel) -> None:
        """From now on compute attention with ``kernel``. Raises ValueError or ImportError where the model's code does
        not support the kernel."""

    def backward(self, loss: torch.Tensor, *, last: bool) -> None:
        """Accumulate the gradient of ``loss``, averaged over the ranks. ``last`` marks the last micro-batch of the
        global batch."""

    def gradient_norm(self) -> float:
        """Return the L2 norm of the accumulated gradient over all ranks, before clipping; NaN where the norm is not
        finite. Call this before `step`, and do not call `step` where the norm is NaN."""

    def step(self, rate: float) -> None:
        """Clip the accumulated gradient and update the weights with the learning rate ``rate``."""

    def discard_gradient(self) -> None:
        """Drop the accumulated gradient, so that no update is made with it."""

    def close(self) -> None:
        """Free weights, gradients and optimizer state. The engine can't be used afterwards."""

    # Functions that read and write the training state, for checkpoints

    @property
    def parameter_shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Whole shapes of the trained parameters by name, in the model's order."""

    def read_state(self, name: str) -> dict[str, torch.Tensor]:
        """Return the whole fp32 value of the trained parameter ``name`` and AdamW's two moments, under the keys MASTER,
        FIRST_MOMENT and SECOND_MOMENT of `engine.py`."""

    def read_fragment(self, name: str, kind: str) -> Fragment:
        """Return the part that this rank holds of the trained parameter ``name``: of its fp32 value (MASTER) or of one
        of AdamW's two moments (FIRST_MOMENT, SECOND_MOMENT), as ``kind`` says. Before the first update the moments are
        zero. The call communicates with no other rank."""

    def prepare_state(self, updates: int) -> None:
        """Create the optimizer's state as it is after ``updates`` updates, so that `write_state` can fill it."""

    def write_state(self, name: str, tensors: Mapping[str, torch.Tensor]) -> None:
        """Set the fp32 value and the moments of the trained parameter ``name`` to ``tensors``, as `read_state` returned
        them. The weights that the model computes with are set by `load_weights` before the engine is made."""

    def write_weight(self, name: str, value: torch.Tensor) -> None:
        """Set the weight that the model computes with to ``value``, an fp32 tensor of a checkpoint. Training can't go
        on after this call."""
