"""A plain training loop in one process: PyTorch and transformers, without the trainer's engine, batches and DeepSpeed.

The losses and perplexities of the trainer must equal those of this loop.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoModelForCausalLM

from finetune_core.api.method import LoRASpec
from finetune_trainer.model.adapters import add_adapters

DENSE = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
"""The layers of the tiny model that get an adapter."""


class PlainExample(NamedTuple):
    """The token ids of an example, and for each token whether it is learned. The flag of the first token is ignored,
    because there is no token before it that could predict it."""

    ids: Sequence[int]
    learned: Sequence[bool]


@dataclass(frozen=True)
class Plain:
    """Losses, perplexities and model of the plain training loop."""

    losses: list[float]
    perplexity: float
    """Perplexity of the trained model over the learned tokens of the validation examples."""
    base_perplexity: float
    """Perplexity of the model before the first step, over the same tokens."""
    model: Any = field(repr=False)


def plain_loop(
    folder: Path,
    method: str,
    train: Sequence[PlainExample],
    validation: Sequence[PlainExample],
    batches: Sequence[Sequence[int]],
    *,
    rate: float,
    weight_decay: float = 0.0,
    dtype: torch.dtype = torch.float32,
) -> Plain:
    """Train the model in ``folder``. ``batches`` has the numbers of the examples of each step."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    if method == "LoRA":
        model = add_adapters(model, LoRASpec(rank=4, alpha=8), targets=DENSE, seed=42, base_name="tiny")
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    matrices = [parameter for parameter in trained if parameter.ndim >= 2]
    vectors = [parameter for parameter in trained if parameter.ndim < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=rate)
    base_perplexity = plain_perplexity(model, validation)
    losses = plain_losses(model, optimizer, train, batches)
    return Plain(losses, plain_perplexity(model, validation), base_perplexity, model)


def plain_losses(
    model: Any, optimizer: torch.optim.Optimizer, train: Sequence[PlainExample], batches: Sequence[Sequence[int]]
) -> list[float]:
    """Train the parameters of ``optimizer``, and return the loss of each step. ``batches`` has the numbers of the
    examples of each step."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    losses = []
    for batch in batches:
        loss = _mean_nll(model, [train[row] for row in batch])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        losses.append(loss.item())
    return losses


def plain_perplexity(model: Callable[..., Any], examples: Sequence[PlainExample]) -> float:
    """Return the perplexity of ``model`` over the learned tokens of ``examples``."""
    with torch.no_grad():
        return math.exp(_mean_nll(model, examples).item())


def _mean_nll(model: Callable[..., Any], examples: Sequence[PlainExample]) -> torch.Tensor:
    """Return the mean negative log-likelihood (nats) of the learned tokens of all ``examples``."""
    sums, count = [], 0
    for example in examples:
        ids = torch.tensor([example.ids])
        log_probabilities = model(ids).logits[0, :-1].log_softmax(-1)
        wanted = log_probabilities.gather(1, ids[0, 1:, None])[torch.tensor(example.learned[1:])]
        sums.append(-wanted.sum())
        count += len(wanted)
    return torch.stack(sums).sum() / count


def plain_order(rows: int, name: str) -> list[int]:
    """Return the numbers from 0 to ``rows`` - 1, ordered by the digest of ``name`` and the number."""
    return sorted(range(rows), key=lambda row: hashlib.blake2b(f"{name}/{row}".encode(), digest_size=16).digest())


def plain_batches(
    sizes: Sequence[int], weights: Sequence[str | None], *, steps: int, size: int, seed: int = 42
) -> list[list[int]]:
    """Return the numbers of the examples of each step. ``sizes`` has the number of examples of each source, and
    ``size`` is the number of examples in a step. If ``weights`` is empty, there is one source. If ``weights`` has the
    weights of a mix, the examples are in the order that the documentation defines for a mix."""
    total, taken = sum(sizes), []
    epochs = range(-(-steps * size // total))
    if weights:
        shares = [Fraction(count if weight is None else weight) for count, weight in zip(sizes, weights, strict=True)]
        times = sorted(
            (Fraction(2 * number + 1) / share, source, number)
            for source, share in enumerate(shares)
            for number in range(len(epochs) * total)
        )
        for _, source, number in times[: len(epochs) * total]:
            turn, place = divmod(number, sizes[source])
            taken.append(sum(sizes[:source]) + plain_order(sizes[source], f"{seed}/{source}/{turn}")[place])
    else:
        taken = [row for epoch in epochs for row in plain_order(total, f"{seed}/{epoch}")]
    per_epoch = [taken[start : start + total] for start in range(0, len(taken), total)]
    return [epoch[start : start + size] for epoch in per_epoch for start in range(0, total, size)][:steps]
