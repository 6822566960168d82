"""The parts of a training step that have fused kernels, and the variable with which a user leaves some of them plain.

`launcher.py` and the preflight check read the variable before anything is downloaded, and `train.py` reads it for the
engine. Nothing here imports torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum

from finetune_core.errors import UserError

PLAIN_KERNELS_VARIABLE = "FINETUNE_PLAIN_KERNELS"
"""Name of the environment variable that names the parts to be left plain, separated by commas."""


class KernelPart(StrEnum):
    """The parts of a training step that can be left plain."""

    NORMS = "Norms"
    """Root mean square norms."""
    ROTARY = "Rotary"
    """Rotary position embeddings."""
    GATED_PRODUCTS = "GatedProducts"
    """The product of activation and up in a feed-forward layer."""
    PROJECTIONS = "Projections"
    """Linear layers with an adapter, and those that read the same tensor."""
    GATED_PROJECTIONS = "GatedProjections"
    """The last linear layer of a gated feed-forward layer, without its input in memory. It is plain too where
    GATED_PRODUCTS is."""
    DROPOUT = "Dropout"
    """LoRA's dropout inside of the products with the matrices A."""
    HEAD_LOSS = "HeadLoss"
    """The loss of the output head, with its gradients computed in the forward pass. It belongs to `loss/head.py`, and
    `use_fused_kernels` leaves it alone."""


NOT_UNDER_ZERO_3 = frozenset(
    {KernelPart.GATED_PRODUCTS, KernelPart.PROJECTIONS, KernelPart.GATED_PROJECTIONS, KernelPart.DROPOUT}
)
"""The parts that take the place of modules without calling them. ZeRO-3 gathers the weights of a module only when the
module is called. For that DeepSpeed registers hooks on every module, also on those without weights, such as the
activations of gated layers, and no kernel takes the place of a module with hooks."""


def parts_left_plain(environment: Mapping[str, str]) -> frozenset[KernelPart]:
    """Return the parts that the variable PLAIN_KERNELS_VARIABLE of ``environment`` names, for example
    `Rotary, HeadLoss`. Without the variable no part is left plain. Raises UserError for another name."""
    known = {part.value.lower(): part for part in KernelPart}
    names = [name.strip() for name in environment.get(PLAIN_KERNELS_VARIABLE, "").split(",")]
    unknown = next((name for name in names if name and name.lower() not in known), None)
    if unknown is not None:
        raise UserError(
            f"podTemplate.env: {PLAIN_KERNELS_VARIABLE}",
            f"must name parts of {', '.join(KernelPart)}, separated by commas: {unknown!r} is none of them",
        )
    return frozenset(known[name.lower()] for name in names if name)
