"""An optimizer step as the trainer's loop makes it (`loop.py`), and the same updates by a plain loop.

The trainer's own loop needs a bucket and data files, so the order of its calls is repeated here.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from finetune_trainer.data.batches import Batch
from finetune_trainer.data.examples import Example
from finetune_trainer.engine.engine import BETAS, EPSILON
from finetune_trainer.engine.host_copy import HostCopy
from finetune_trainer.engine.interface import TrainingEngine
from finetune_trainer.engine.state import take_snapshot
from finetune_trainer.ranks.gang import Gang

CLIPPING = 1.0


@dataclass(frozen=True)
class Step:
    """Mean loss of the supervised tokens in nats, and the L2 norm of the gradient before clipping."""

    loss: float
    norm: float


def train_step(engine: TrainingEngine, gang: Gang, micro_batches: Sequence[Batch], rate: float) -> Step:
    """Make one optimizer step from ``micro_batches``, which are on the CPU."""
    tokens = sum(batch.tokens for batch in micro_batches)
    factor = gang.world_size / max(1, tokens)
    nll = torch.zeros((), dtype=torch.float64, device=gang.device)
    copied = map(partial(Batch.to, device=gang.device), micro_batches)
    following = next(copied)
    for index in range(1, len(micro_batches) + 1):
        gang.check_stop()
        batch = following
        loss = engine.loss(batch, factor=factor)
        nll += loss.detach()
        engine.backward(loss * factor, last=index == len(micro_batches))
        following = next(copied, batch)
    copied_nll = HostCopy(nll)
    norm = engine.gradient_norm()
    total = gang.sum_over_ranks([copied_nll.read()])[0]
    engine.step(rate)
    return Step(total / max(1, tokens), norm)


def timed_steps(
    engine: TrainingEngine, gang: Gang, micro_batches: Sequence[Batch], rate: float, steps: int
) -> Iterator[float]:
    """Make ``steps`` optimizer steps and yield the seconds of each. A step ends when the GPU is done with it."""
    for _ in range(steps):
        began = time.perf_counter()
        train_step(engine, gang, micro_batches, rate)
        synchronize(gang.device)
        yield time.perf_counter() - began


def synchronize(device: torch.device) -> None:
    """Wait until the GPU has done all work so far."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def plain_steps(model: Any, steps: Sequence[Sequence[Example]], rate: float, device: torch.device) -> list[Step]:
    """Train ``model`` by a plain loop: transformers' logits of one example after the other, torch's AdamW and torch's
    clipping. ``steps`` has the examples of each step."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate, betas=BETAS, eps=EPSILON, weight_decay=0.0)
    model.train()
    made = []
    for examples in steps:
        sums, count = [], 0
        for example in examples:
            ids = torch.tensor([list(example.ids)], device=device)
            first, last = example.spans[0]
            log_probabilities = model(input_ids=ids, use_cache=False).logits[0, first - 1 : last - 1].log_softmax(-1)
            sums.append(-log_probabilities.gather(1, ids[0, first:last, None]).sum())
            count += last - first
        loss = torch.stack(sums).sum() / count
        optimizer.zero_grad()
        loss.backward()
        norm = float(torch.nn.utils.clip_grad_norm_(trained, CLIPPING))
        optimizer.step()
        made.append(Step(loss.item(), norm))
    return made


def state_of(engine: TrainingEngine) -> dict[str, torch.Tensor]:
    """Return the training state on the CPU: the fp32 value and the moments of each trained parameter."""
    return take_snapshot(engine, rank=0, world_size=1)
