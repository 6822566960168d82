"""Answers of the model to prompts: batched, padded on the left, greedy, and the same for any batch size and rank count.

All ranks go through equally many batches, and under ZeRO-3 through equally many forward passes of each, or they would
wait for each other for ever.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig as HuggingFaceConfig
from transformers import StoppingCriteria, StoppingCriteriaList

from finetune_trainer.data.order import micro_batches
from finetune_trainer.engine.engine import Engine
from finetune_trainer.ranks.gang import Gang

SUFFIX_SLACK = 4
"""More tokens than a suffix has are looked at: they may be split otherwise behind another text."""


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """How prompts become text."""

    tokenizer: Any
    stop_ids: Sequence[int]
    """Tokens that end an answer."""
    suffix: str
    """Text that ends an answer and does not belong to it; may be empty."""
    suppressed: Sequence[int]
    """Tokens that are never chosen: the base model does not know the job's added tokens."""
    batch_size: int
    max_new_tokens: int
    context: int
    """Longest text that the model reads, prompt and answer together."""


def answers(
    engine: Engine, gang: Gang, prompts: Sequence[Sequence[int]], decoding: Decoding
) -> Iterator[dict[int, str]]:
    """Yield this rank's answers batch by batch, by the place of their prompt; every rank yields equally often.

    A collective at each batch; raises StopAgreed there.
    """
    own = micro_batches(
        [[row] for row in range(len(prompts))],
        [len(prompt) for prompt in prompts],
        rank=gang.rank,
        world_size=gang.world_size,
        micro_batch_size=decoding.batch_size,
    )
    engine.train(False)
    try:
        for batch in own:
            gang.check_stop()
            rows = [row for sequence in batch for row in sequence]
            made = _generate(engine, gang, [prompts[row] for row in rows], decoding)
            yield {row: _text(ids, decoding) for row, ids in zip(rows, made, strict=True)}
    finally:
        engine.train()


def left_padded(prompts: Sequence[Sequence[int]], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids and attention mask, both (B, T): each prompt ends at the last column, where its answer begins."""
    longest = max(len(prompt) for prompt in prompts)
    ids = torch.full((len(prompts), longest), pad)
    mask = torch.zeros_like(ids)
    for line, prompt in enumerate(prompts):
        ids[line, longest - len(prompt) :] = torch.as_tensor(prompt, dtype=torch.long)
        mask[line, longest - len(prompt) :] = 1
    return ids, mask


def _generate(engine: Engine, gang: Gang, prompts: Sequence[Sequence[int]], decoding: Decoding) -> list[list[int]]:
    """Return the new token ids of each prompt."""
    pad = int(decoding.tokenizer.eos_token_id)
    if not prompts and not engine.lockstep:
        return []
    # Without a prompt of its own a rank computes along for the others' sake.
    ids, mask = left_padded(prompts or [[pad]], pad)
    width = ids.shape[1]
    config = HuggingFaceConfig(
        do_sample=False,
        num_beams=1,
        repetition_penalty=1.0,
        use_cache=True,
        max_new_tokens=max(1, min(decoding.max_new_tokens, decoding.context - width)),
        eos_token_id=list(decoding.stop_ids),
        pad_token_id=pad,
        suppress_tokens=list(decoding.suppressed) or None,
    )
    criteria: list[StoppingCriteria] = [_Told(gang)]
    if decoding.suffix:
        criteria.append(_Suffix(decoding, width))
    with torch.no_grad():
        made = engine.model.generate(
            input_ids=ids.to(engine.device),
            attention_mask=mask.to(engine.device),
            generation_config=config,
            stopping_criteria=StoppingCriteriaList(criteria),
            synced_gpus=engine.lockstep,
        )
    return [row[width:].tolist() for row in made.cpu()][: len(prompts)]


def _text(ids: Sequence[int], decoding: Decoding) -> str:
    """Return the answer's text up to what ends it."""
    end = next((place for place, token in enumerate(ids) if token in decoding.stop_ids), len(ids))
    text = str(decoding.tokenizer.decode(ids[:end], skip_special_tokens=True))
    return text.split(decoding.suffix)[0] if decoding.suffix else text


class _Told(StoppingCriteria):  # type: ignore[misc]  # transformers has no types here
    """Ends the batch early once this process is told to stop: its answers are not used then."""

    def __init__(self, gang: Gang) -> None:
        self._gang = gang

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        """Return (B,) whether each answer is complete."""
        return torch.full((input_ids.shape[0],), self._gang.stop_requested(), device=input_ids.device)


class _Suffix(StoppingCriteria):  # type: ignore[misc]  # transformers has no types here
    """Ends an answer that has come to its suffix."""

    def __init__(self, decoding: Decoding, width: int) -> None:
        self._decoding = decoding
        self._width = width
        suffix_ids = decoding.tokenizer(decoding.suffix, add_special_tokens=False)["input_ids"]
        self._tail = len(suffix_ids) + SUFFIX_SLACK

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        """Return (B,) whether each answer is complete."""
        start = max(self._width, input_ids.shape[1] - self._tail)
        tails = self._decoding.tokenizer.batch_decode(input_ids[:, start:])
        return torch.tensor([self._decoding.suffix in tail for tail in tails], device=input_ids.device)
