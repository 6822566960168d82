"""Makes many real learning curves: trains many small language models with different random numbers. All models are
trained together, as one batch of tensors.

Each model learns a Markov chain of its own with AdamW, so that losses and gradient norms have the noise and shape of
real training. A fault changes the training (labels, learning rate, gradient) and never the recorded figures.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

WORDS, WIDTH, HIDDEN = 40, 16, 64
EXAMPLES, LENGTH = 16, 12
RATE = 1.5e-2


@dataclass
class Step:
    """The inputs of one training step, which a fault may change before the update.

    In the shapes below, S is the number of models, and N the number of predicted words for each model.
    """

    number: int
    contexts: torch.Tensor
    """Word ids of shape (S, N, 2): the two words before each target."""
    targets: torch.Tensor
    """Target word ids of shape (S, N)."""
    rate: float
    gradient_factor: float = 1.0
    generator: torch.Generator = field(default_factory=torch.Generator)


Fault = Callable[[Step], None]


def train(
    seeds: int, steps: int, fault: Fault = lambda _: None, *, first_seed: int = 0
) -> list[list[tuple[float, float]]]:
    """Train ``seeds`` models, and return for each model its pairs (loss, gradient norm before clipping), one for each
    step. All random numbers follow from ``first_seed``."""
    generator = torch.Generator().manual_seed(first_seed)
    # With a probability of 0.9 the preceding word determines the next word. Otherwise the next word is random.
    chain = torch.full((seeds, WORDS, WORDS), 0.1 / WORDS)
    for seed in range(seeds):
        chain[seed, torch.arange(WORDS), torch.randperm(WORDS, generator=generator)] += 0.9

    def fresh(*shape: int) -> torch.Tensor:
        return (torch.randn(seeds, *shape, generator=generator) / math.sqrt(shape[0])).requires_grad_()

    weights = [fresh(WORDS, WIDTH), fresh(2 * WIDTH, HIDDEN), fresh(HIDDEN, WORDS)]
    optimizer = torch.optim.AdamW(weights, lr=RATE, weight_decay=0.0)
    curves: list[list[tuple[float, float]]] = [[] for _ in range(seeds)]
    rows = torch.arange(seeds)[:, None]
    for number in range(1, steps + 1):
        words = torch.randint(WORDS, (seeds, EXAMPLES), generator=generator)
        text = [words]
        for _ in range(LENGTH + 1):
            flat = chain[rows, text[-1]].flatten(0, 1)
            text.append(torch.multinomial(flat, 1, generator=generator).view(seeds, EXAMPLES))
        tokens = torch.stack(text, dim=-1)  # Shape (S, EXAMPLES, LENGTH + 2)
        contexts = torch.stack([tokens[..., :-2], tokens[..., 1:-1]], dim=-1).flatten(1, 2)
        step = Step(number, contexts, tokens[..., 2:].flatten(1, 2), RATE, generator=generator)
        fault(step)
        embedded = weights[0][rows[..., None], step.contexts].flatten(2)
        logits = torch.relu(embedded @ weights[1]) @ weights[2]
        losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), step.targets, reduction="none").mean(1)
        optimizer.zero_grad()
        losses.sum().backward()
        gradients = [weight.grad * step.gradient_factor for weight in weights if weight.grad is not None]
        norms = torch.stack([gradient.flatten(1).norm(dim=1) for gradient in gradients]).norm(dim=0)
        for curve, loss, norm in zip(curves, losses.tolist(), norms.tolist(), strict=True):
            curve.append((loss, norm))
        if bool(torch.isfinite(norms).all()):
            scale = (1.0 / (norms + 1e-6)).clamp(max=1.0)
            for weight, gradient in zip(weights, gradients, strict=True):
                weight.grad = gradient * scale.view(-1, *[1] * (weight.ndim - 1))
            optimizer.param_groups[0]["lr"] = step.rate
            optimizer.step()
    return curves
