"""Keeps packed examples apart in the attention of every model, and computes FlashAttention over them.

`loss/objective.py` notes the borders of the examples of each micro-batch. transformers itself finds the borders in
`position_ids`, but the code of some models does not pass `position_ids` on to the masks. So the masks of this module
separate the examples again, by the noted borders. Where no borders are noted, for example while text is generated,
masks and attention are those of transformers.

To find packed examples, transformers also reads a result of the device in each forward pass, for which the CPU would
wait until a GPU has done all work before. Where the micro-batch is noted, this module answers without that.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, masking_utils
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import (
    and_masks,
    eager_mask,
    flex_attention_mask,
    packed_sequence_mask_function,
    sdpa_mask,
)

from finetune_trainer.model.attention import IMPLEMENTATIONS, Kernel

_FIND = masking_utils.find_packed_sequence_indices
OTHER_SOFTMAX = ("softcap", "s_aux", "position_bias")
"""Arguments with which models ask for another softmax than that of FlashAttention: soft caps, sinks, biases."""


@dataclass
class Borders:
    """The borders of the packed examples of a micro-batch with B sequences of T tokens."""

    starts: torch.Tensor
    """Shape (S + 1,), int32: the first token of each of S examples in the flattened B * T tokens, in order, and B * T.
    The padding at the end of a sequence counts as an example."""
    longest: int
    """Number of tokens of the longest example."""
    numbers: torch.Tensor
    """Shape (B, T), int32: for each token the number of its example."""

    @property
    def inside(self) -> bool:
        """Whether an example begins inside of a sequence, and not only at the beginning of each sequence."""
        return len(self.starts) - 1 > len(self.numbers)


class _Noted:
    """Holds what is known of the micro-batch that the model computes."""

    borders: Borders | None = None
    """None where no examples are packed."""
    shape: tuple[int, int] | None = None
    """(B, T). None where nothing is known, for example while text is generated."""


def note_borders(starts: torch.Tensor | None, longest: int = 0, *, shape: tuple[int, int] = (0, 0)) -> None:
    """Note the borders of the examples that the model computes from now on. ``shape`` is (B, T), and the other
    arguments are as in `Borders`. Where ``starts`` is None, each sequence is one example, or nothing is known of the
    sequences if ``shape`` is missing."""
    _Noted.shape = shape if shape != (0, 0) else None
    if starts is None:
        _Noted.borders = None
        return
    tokens = torch.arange(shape[0] * shape[1], dtype=torch.int32, device=starts.device)
    _Noted.borders = Borders(starts, longest, torch.bucketize(tokens, starts, right=True, out_int32=True).view(shape))


def install() -> None:
    """Let transformers use the masks and the attention of this module, in all models of this process."""
    for kernel, mask in ((Kernel.SDPA, sdpa_mask), (Kernel.EAGER, eager_mask), (Kernel.FLEX, flex_attention_mask)):
        AttentionMaskInterface.register(IMPLEMENTATIONS[kernel], _separated(mask))
    AttentionMaskInterface.register(IMPLEMENTATIONS[Kernel.FLASH], _window_or_mask)
    AttentionInterface.register(IMPLEMENTATIONS[Kernel.FLASH], varlen_attention)
    masking_utils.find_packed_sequence_indices = packed_sequence_indices


def packed_sequence_indices(position_ids: torch.Tensor) -> torch.Tensor | None:
    """Return what the function of transformers with this purpose returns for ``position_ids`` (B, T): for each token
    the number of its example in its sequence, and None where each sequence is one example. Where the micro-batch is
    noted, the CPU reads nothing of the device: only numbers of examples decide, which the CPU knows."""
    if position_ids.shape != _Noted.shape:
        found: torch.Tensor | None = _FIND(position_ids)
        return found
    if _Noted.borders is None or not _Noted.borders.inside:
        return None
    # An example begins where the position does not follow the one before it, as in transformers.
    before = torch.cat([position_ids[:, :1] - 1, position_ids[:, :-1]], dim=1)
    return (position_ids - before != 1).cumsum(-1)


def _separated(mask: Any) -> Any:
    """Return a function that makes the same mask as ``mask``, a mask function of transformers. Where borders are noted,
    the mask also separates the examples."""

    def separated(*args: Any, mask_function: Any, **options: Any) -> Any:
        if _Noted.borders is not None and _Noted.borders.inside:
            # The mask of transformers may separate the examples already. Then this mask changes nothing. Where each
            # sequence is one example, transformers may leave out its mask, and torch then takes a faster kernel.
            mask_function = and_masks(mask_function, packed_sequence_mask_function(_Noted.borders.numbers))
            options["allow_is_causal_skip"] = False
        return mask(*args, mask_function=mask_function, **options)

    return separated


def _window_or_mask(*args: Any, config: Any = None, **options: Any) -> torch.Tensor | None:
    """Return the mask of SDPA where no borders are noted. Otherwise return what `varlen_attention` needs to know: None
    for causal attention, and for a sliding window of W tokens any tensor whose last dimension is W. The returned
    tensor has to carry the window, because some models pass it to the masks only, and not to the attention.

    Raises ValueError where the model asks for another mask.
    """
    if _Noted.borders is None:
        mask: torch.Tensor | None = sdpa_mask(*args, config=config, **options)
        return mask
    window = options.get("local_size")
    if options.get("use_vmap") or (window is not None and window != getattr(config, "sliding_window", None)):
        raise ValueError("FlashAttention knows causal masks and sliding windows only")
    return None if window is None else torch.empty(1, 1, 1, window, device=options.get("device"))


def varlen_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Return causal attention inside of each example, (B, T, heads, features), for ``query`` (B, heads, T, features)
    and for ``key`` and ``value``, which may have fewer heads. ``attention_mask`` is what `_window_or_mask` returned.

    Raises ValueError where the model asks for another kind of attention. Where no borders are noted, return the
    attention of SDPA.
    """
    borders = _Noted.borders
    if borders is None:
        mixed: torch.Tensor = sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **options
        )[0]
        return mixed, None
    unknown = [name for name in OTHER_SOFTMAX if options.get(name) is not None]
    if unknown or not getattr(module, "is_causal", True):
        raise ValueError(f"FlashAttention has no {', '.join(unknown) or 'attention but causal attention'}")
    batch, heads, length, _ = query.shape
    q, k, v = (tensor.transpose(1, 2).reshape(batch * length, tensor.shape[1], -1) for tensor in (query, key, value))
    compute = _flash if query.device.type == "cuda" else _one_by_one
    window = attention_mask.shape[-1] if attention_mask is not None else None
    mixed = compute(q, k, v, borders, scaling=scaling, window=window)
    return mixed.reshape(batch, length, heads, -1), None


def _flash(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    borders: Borders,
    *,
    scaling: float | None,
    window: int | None,
) -> torch.Tensor:
    from torch.nn.attention.varlen import varlen_attn

    mixed: torch.Tensor = varlen_attn(
        query,
        key,
        value,
        borders.starts,
        borders.starts,
        borders.longest,
        borders.longest,
        scale=scaling,
        # torch's window counts the tokens before the token that reads. transformers' window counts this token too.
        window_size=(-1, 0) if window is None else (window - 1, 0),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return mixed


def _one_by_one(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    borders: Borders,
    *,
    scaling: float | None,
    window: int | None,
) -> torch.Tensor:
    """Compute what `_flash` computes, one example after the other, on devices without FlashAttention."""
    starts = borders.starts.tolist()
    mixed = []
    for first, end in pairwise(starts):
        q, k, v = (tensor[first:end].transpose(0, 1) for tensor in (query, key, value))
        distance = torch.arange(end - first).unsqueeze(1) - torch.arange(end - first)
        seen = (distance >= 0) & (distance < (window or end - first))
        mixed.append(
            nn.functional.scaled_dot_product_attention(
                q, k, v, attn_mask=seen, scale=scaling, enable_gqa=q.shape[0] != k.shape[0]
            ).transpose(0, 1)
        )
    return torch.cat(mixed)
