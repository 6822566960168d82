"""Chooses the kernel that computes attention (`training.attention`), and refuses what the code of a model can't do.

The functions compute no attention. They look only at the class and the configuration of a model, at settings of the
job, at the device, and at the compilers in the image. `base_check.py` calls `check_abilities` and `kernels` before a
model is loaded, `train.py` calls `kernels` again with the device, and `engine/checks.py` tries the returned kernels in
their order. `packed_attention.py` holds the kernel Flash.
"""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import torch

from finetune_core.api.training import Attention, Precision
from finetune_core.errors import UserError


class Kernel(StrEnum):
    """A kernel that computes attention. Its value is its name in `training.attention`."""

    FLASH = "Flash"
    SDPA = "SDPA"
    FLEX = "Flex"
    EAGER = "Eager"


IMPLEMENTATIONS: Mapping[Kernel, str] = {
    Kernel.FLASH: "finetune_varlen",
    Kernel.SDPA: "sdpa",
    Kernel.FLEX: "flex_attention",
    Kernel.EAGER: "eager",
}
"""The names of the kernels in transformers (`attn_implementation`)."""
FLASH_CAPABILITY = (8, 0)
"""The oldest CUDA architecture that FlashAttention 2 computes on: Ampere."""
STATELESS_LAYERS = {"full_attention", "sliding_attention", "chunked_attention", "indexed_attention", "mlp", "moe"}
"""The types of layers (`layer_types` of a configuration) in which a token reads other tokens through an attention mask,
or reads no other tokens. All other types, such as `linear_attention` or `conv`, carry a state from token to token."""


@dataclass(frozen=True)
class ModelAbilities:
    """Which attention kernels and other settings the code of a model supports."""

    name: str
    """Class of the model, for example `LlamaForCausalLM`."""
    sdpa: bool = True
    flash: bool = True
    flex: bool = True
    state: str = ""
    """The layers that carry a state from token to token, for example `linear_attention layers`; empty without such
    layers. The state passes the borders of packed examples."""
    recomputes: bool = True
    """Whether the model can compute activations again in the backward pass (gradient checkpointing)."""

    @classmethod
    def of(cls, model: Any) -> ModelAbilities:
        """Return what the transformers model ``model`` supports. The model may be on the meta device."""
        types = set(getattr(model.config.get_text_config(), "layer_types", None) or ())
        carrying = sorted(types - STATELESS_LAYERS)
        state = f"{', '.join(carrying)} layers" if carrying else ""
        return cls(
            name=type(model).__name__,
            sdpa=bool(model._supports_sdpa),
            flash=bool(model._supports_flash_attn and model._supports_attention_backend),
            flex=bool(model._supports_flex_attn),
            state=state or ("recurrent layers" if model._is_stateful else ""),
            recomputes=bool(model.supports_gradient_checkpointing),
        )


@dataclass(frozen=True)
class DeviceAbilities:
    """What a device and the image of the trainer support."""

    gpu: bool
    flash: bool = False
    """Whether the GPU is one that FlashAttention computes on."""
    compiler: bool = False
    """Whether the image has what FlexAttention is compiled with: Triton, and a C compiler."""

    @classmethod
    def of(cls, device: torch.device) -> DeviceAbilities:
        """Return what ``device`` and this image support."""
        if device.type != "cuda":
            return cls(gpu=False)
        compiler = importlib.util.find_spec("triton") is not None and any(map(shutil.which, ("cc", "gcc", "clang")))
        return cls(True, torch.cuda.get_device_capability(device) >= FLASH_CAPABILITY, compiler)


def why_not(kernel: Kernel, model: ModelAbilities, device: DeviceAbilities | None, precision: Precision) -> str:
    """Return why ``kernel`` can't be used, in the words that follow "because", or an empty text if it can.

    Without ``device``, only what the model and the precision exclude is known.
    """
    if kernel is Kernel.EAGER:
        return ""
    # Flash needs the support of SDPA too. A model whose attention has a soft cap or sinks does not support SDPA, and
    # torch's FlashAttention computes neither soft caps nor sinks.
    supported = {Kernel.SDPA: model.sdpa, Kernel.FLASH: model.flash and model.sdpa, Kernel.FLEX: model.flex}[kernel]
    if not supported:
        return f"transformers' {model.name} does not support it"
    if kernel is Kernel.FLASH and precision != "bf16":
        return f"it computes in bf16, and training.precision is {precision}"
    if device is None or kernel is Kernel.SDPA:
        return ""
    if not device.gpu:
        return "it trains on GPUs only"
    if kernel is Kernel.FLASH and not device.flash:
        return "this GPU is older than Ampere"
    if kernel is Kernel.FLEX and not device.compiler:
        return "it is compiled when the training begins, and the trainer's image has no C compiler"
    return ""


def kernels(
    requested: Attention,
    model: ModelAbilities,
    device: DeviceAbilities | None,
    precision: Precision,
    *,
    packing: bool,
) -> list[Kernel]:
    """Return the kernels that may compute the attention, the fastest first. The list is never empty.

    Raises UserError where the kernel that the job names can't be used. ``device`` is None where it is not known yet.
    """
    if requested != "Auto":
        named = Kernel(requested)
        reason = why_not(named, model, device, precision)
        if not reason and named is Kernel.FLASH and not packing:
            reason = "it computes packed examples only, and dataset.packing is false"
        if reason:
            raise UserError("training.attention", f"must not be {named} for this job, because {reason}")
        return [named]
    # SDPA is as fast as FlashAttention where no mask is needed. For packed examples SDPA needs a mask, with a value
    # for each pair of positions.
    order = [Kernel.FLASH, Kernel.SDPA] if packing else [Kernel.SDPA]
    return [kernel for kernel in (*order, Kernel.FLEX, Kernel.EAGER) if not why_not(kernel, model, device, precision)]


def check_abilities(model: ModelAbilities, *, packing: bool, gradient_checkpointing: bool) -> None:
    """Raise UserError where the job asks for something that the code of the model can't do."""
    if packing and model.state:
        raise UserError(
            "dataset.packing",
            f"must be false for this model: its {model.state} carry what they have read from one packed example into"
            " the next",
        )
    if gradient_checkpointing and not model.recomputes:
        raise UserError(
            "training.gradientCheckpointing", f"must be false: transformers' {model.name} can't recompute activations"
        )
