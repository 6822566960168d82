"""Dropout that does not depend on how examples are batched: what is dropped follows from (seed, step, row, position,
layer, feature) only.

`objective.py` replaces the dropout of LoRA adapters with `ExampleDropout`. torch's own dropout draws from a random
stream, so its masks depend on ranks, micro-batches, packing and recomputation. Here each decision is a hash of
integers, which is exact on every device. No random state has to be saved, and packed, padded and distributed runs drop
the same features.
"""

from __future__ import annotations

import hashlib

import torch
from torch import nn


class DropoutKeys:
    """Holds one dropout key for each token that the layers currently compute. From the key, `ExampleDropout` derives
    what is dropped. The keys are int64 of shape (batch, length). While the output head computes the loss of a chunk of
    positions, the keys of the head have the shape (number of positions,)."""

    def __init__(self) -> None:
        """Begin without keys. `Objective` and `LossHead` set the keys before the layers compute."""
        self.value: torch.Tensor | None = None


class ExampleDropout(nn.Module):  # type: ignore[misc]  # torch has no types here
    """In training, sets each feature of each token to zero with probability ``p``."""

    def __init__(self, p: float, name: str, keys: DropoutKeys) -> None:
        """Make the dropout of the layer ``name``. Layers with different names drop different features. ``keys`` holds
        the keys of the tokens that `forward` gets."""
        super().__init__()
        self.p = p
        digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
        self._salt = int.from_bytes(digest, "big", signed=True)
        self._keys = keys

    @property
    def keys(self) -> DropoutKeys:
        """The keys of the tokens that `forward` gets."""
        return self._keys

    @property
    def salt(self) -> int:
        """A number that differs between layers. `forward` combines it with each key by exclusive or."""
        return self._salt

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """In training, return ``x`` (..., F) with dropped features set to zero and the others divided by 1 - p. In
        evaluation mode return ``x`` unchanged."""
        if not self.training or self.p == 0:
            return x
        keys = self._keys.value
        if keys is None or keys.shape != x.shape[:-1]:
            raise RuntimeError("dropout has no keys for these tokens")
        return x * keep_mask(keys ^ self._salt, x.shape[-1], self.p) * (1 / (1 - self.p))

    def extra_repr(self) -> str:
        """Return the text that `print(model)` shows for this layer."""
        return f"p={self.p}"


def keep_mask(keys: torch.Tensor, features: int, p: float) -> torch.Tensor:
    """Return which features are not dropped: a bool tensor of shape (..., ``features``) for ``keys`` of shape (...).
    Each feature stays with probability 1 - ``p``."""
    folded = _as_int32(keys ^ (keys >> 32))
    feature = torch.arange(features, dtype=torch.int32, device=keys.device) * _GOLDEN
    mixed = _mix(_mix(folded).unsqueeze(-1) ^ feature)
    return (mixed & 0x7FFFFFFF) >= round(p * 0x80000000)


_GOLDEN = 0x9E3779B9 - (1 << 32)
"""2^32 divided by the golden ratio, as int32: spreads consecutive feature numbers over all bits."""


def _as_int32(values: torch.Tensor) -> torch.Tensor:
    """Return the low 32 bits of the int64 tensor ``values`` as int32."""
    low = values & 0xFFFFFFFF
    return torch.where(low >= 1 << 31, low - (1 << 32), low).to(torch.int32)


def _mix(values: torch.Tensor) -> torch.Tensor:
    """Return MurmurHash3's 32-bit finaliser `fmix32` of the int32 tensor ``values``. Every input bit affects every
    output bit."""
    values = values ^ _shifted(values, 16)
    values = values * (0x85EBCA6B - (1 << 32))
    values = values ^ _shifted(values, 13)
    values = values * (0xC2B2AE35 - (1 << 32))
    return values ^ _shifted(values, 16)


def _shifted(values: torch.Tensor, bits: int) -> torch.Tensor:
    """Return ``values`` shifted right by ``bits``, filled up with zeros. torch's own shift of an int32 repeats the sign
    bit."""
    return (values >> bits) & ((1 << (32 - bits)) - 1)
