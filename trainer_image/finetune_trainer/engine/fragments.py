"""Reads the fragment of the training state of a parameter that this rank holds, without talking to another rank.

`Engine.read_fragment` calls `own_fragment`. The plain engine holds whole parameters and makes fragments itself. The
module depends on DeepSpeed's internals, as `engine.py` does: DeepSpeed has public functions for fragments at ZeRO stage
3 only, and its functions for whole parameters reduce or gather each tensor over all ranks (`get_full_hp_param` in
deepspeed/utils/tensor_fragment.py and deepspeed/runtime/zero/stage3.py).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch


class Fragment(NamedTuple):
    """The part of a trained parameter, or of one of its moments, that a rank holds."""

    start: int
    """Number of the first element, in the flattened whole parameter."""
    values: torch.Tensor
    """The elements: fp32, one dimension, on the device or, with offload, in the memory of the host. The values change
    with the next update. Empty where the rank holds nothing of the parameter."""


def own_fragment(
    parameter: torch.nn.Parameter, optimizer: Any, *, stage: int, rank: int, moment: str | None
) -> Fragment:
    """Return this rank's fragment of the fp32 value of ``parameter``, or of its ``moment`` (torch's name, `exp_avg`).

    ``optimizer`` is DeepSpeed's, or torch's at stage 0, where every rank holds the whole parameter. Before the first
    update no moment of any parameter exists, and the fragment has the zeros with which AdamW begins. An error would end
    only those ranks that hold a part of the parameter, and the other ranks would wait for their parts. After an update,
    a moment that is missing is an error.
    """
    inner = optimizer if stage == 0 else optimizer.optimizer
    if moment is not None and not any(moment in state for state in inner.state.values()):
        value = own_fragment(parameter, optimizer, stage=stage, rank=rank, moment=None)
        return value._replace(values=torch.zeros_like(value.values))
    if stage == 0:
        whole = parameter.detach() if moment is None else optimizer.state[parameter][moment]
        return Fragment(0, whole.flatten())
    if stage == 3:
        return _shard(parameter, rank=rank, moment=moment)
    mapping: Any = parameter._hp_mapping
    if mapping is None:
        # The partition of this rank begins behind the parameter or ends before it.
        return Fragment(0, torch.empty(0))
    values = mapping.hp_fragment if moment is None else mapping.get_optim_state_fragment(moment)
    return Fragment(mapping.lp_fragment_address.start, values.detach().flatten())


def _shard(parameter: torch.nn.Parameter, *, rank: int, moment: str | None) -> Fragment:
    """Return this rank's shard at ZeRO stage 3, without the padding that the last shards have."""
    from deepspeed.utils import safe_get_local_fp32_param, safe_get_local_optimizer_state

    values = (
        safe_get_local_fp32_param(parameter) if moment is None else safe_get_local_optimizer_state(parameter, moment)
    )
    elements: int = parameter.ds_numel
    start = min(rank * values.numel(), elements)
    return Fragment(start, values.detach()[: elements - start])
