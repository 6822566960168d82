"""Dropout that belongs to an example: what is dropped follows from (seed, step, row, position, layer, feature) alone.

torch's dropout draws from a stream, so its masks depend on ranks, micro-batches, packing and recomputation. Here each
decision is a hash of integers, exact on every device: there is no random state to save, and packed, padded and
distributed runs drop the same.
"""

from __future__ import annotations

import hashlib

import torch
from torch import nn


class DropoutKeys:
    """Holds the keys of the tokens that the layers are computing: (B, T), or (N,) at the head."""

    def __init__(self) -> None:
        """Hold none."""
        self.value: torch.Tensor | None = None


class ExampleDropout(nn.Module):  # type: ignore[misc]  # torch has no types here
    """Drops features of each token with probability ``p`` in training."""

    def __init__(self, p: float, name: str, keys: DropoutKeys) -> None:
        """``name`` tells layers apart; ``keys`` holds the keys of the tokens that `forward` will see."""
        super().__init__()
        self.p = p
        digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
        self._salt = int.from_bytes(digest, "big", signed=True)
        self._keys = keys

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return ``x`` (..., F) with dropped features zero and the others scaled by 1 / (1 - p)."""
        if not self.training or self.p == 0:
            return x
        keys = self._keys.value
        if keys is None or keys.shape != x.shape[:-1]:
            raise RuntimeError("dropout has no keys for these tokens")
        return x * kept(keys ^ self._salt, x.shape[-1], self.p) * (1 / (1 - self.p))

    def extra_repr(self) -> str:
        """Return what `print(model)` shows."""
        return f"p={self.p}"


def kept(keys: torch.Tensor, features: int, p: float) -> torch.Tensor:
    """Return which of ``features`` features of each key's token stay (..., F): each with probability 1 - p."""
    folded = _as_int32(keys ^ (keys >> 32))
    feature = torch.arange(features, dtype=torch.int32, device=keys.device) * _GOLDEN
    mixed = _mix(_mix(folded).unsqueeze(-1) ^ feature)
    return (mixed & 0x7FFFFFFF) >= round(p * 0x80000000)


_GOLDEN = 0x9E3779B9 - (1 << 32)


def _as_int32(values: torch.Tensor) -> torch.Tensor:
    """Return the low 32 bits of int64 ``values`` as int32."""
    low = values & 0xFFFFFFFF
    return torch.where(low >= 1 << 31, low - (1 << 32), low).to(torch.int32)


def _mix(values: torch.Tensor) -> torch.Tensor:
    """Return MurmurHash3's 32-bit finaliser of int32 ``values``: every input bit changes every output bit."""
    values = values ^ _shifted(values, 16)
    values = values * (0x85EBCA6B - (1 << 32))
    values = values ^ _shifted(values, 13)
    values = values * (0xC2B2AE35 - (1 << 32))
    return values ^ _shifted(values, 16)


def _shifted(values: torch.Tensor, bits: int) -> torch.Tensor:
    """Return ``values`` shifted right with zeros coming in; torch's shift brings in the sign."""
    return (values >> bits) & ((1 << (32 - bits)) - 1)
