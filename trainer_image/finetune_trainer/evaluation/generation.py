"""Generates the model's answers to prompts by greedy decoding, in batches that are padded on the left. `scorer.py`
calls `generate_answers`.

All ranks generate together, batch by batch, so all ranks run the same number of batches. Under ZeRO-3 every forward
pass is a collective, in which a rank waits for all others, so the number of forward passes in a batch is the same too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig as HuggingFaceConfig
from transformers import StoppingCriteria, StoppingCriteriaList

from finetune_trainer.data.order import micro_batches
from finetune_trainer.engine.interface import TrainingEngine
from finetune_trainer.ranks.gang import Gang

SUFFIX_SLACK = 4
"""The suffix is looked for in the last tokens of an answer: in as many tokens as the suffix alone has, and in
SUFFIX_SLACK more, because the suffix may be split into more tokens where it follows other text."""


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """Settings for generating the answers to an evaluation set. They are the same for every prompt."""

    tokenizer: Any
    stop_ids: Sequence[int]
    """Ids of the tokens that end an answer."""
    suffix: str
    """Text at which an answer ends. It does not belong to the answer, and may be empty."""
    suppressed: Sequence[int]
    """Ids of tokens that are never generated. For the base model these are the job's added tokens."""
    batch_size: int
    """How many prompts a rank answers at once."""
    max_new_tokens: int
    """Longest answer in tokens."""
    context: int
    """Longest text in tokens that the model can read: prompt and answer together."""


def generate_answers(
    engine: TrainingEngine, gang: Gang, prompts: Sequence[Sequence[int]], decoding: Decoding
) -> Iterator[dict[int, str]]:
    """Generate the answers to this rank's share of ``prompts`` (token ids). Yield a dictionary for each batch: the
    text of each answer, by the index of its prompt in ``prompts``.

    Every rank yields equally many dictionaries, of which some may be empty. All ranks must take each dictionary
    together. If a rank has received SIGTERM, StopAgreed is raised before the next batch begins, or after the last
    batch. So all answers are whole where the iteration ends without this error.
    """
    engine.train(False)
    try:
        for rows, longest in _batches(gang, prompts, decoding):
            gang.check_stop()
            made = _generate(engine, gang, [prompts[row] for row in rows], decoding, longest)
            yield {row: answer_text(ids, decoding) for row, ids in zip(rows, made, strict=True)}
        # SIGTERM cuts off the answers of a batch. Without this check, the cut answers of the last batch would count.
        gang.check_stop()
    finally:
        engine.train()


def _batches(gang: Gang, prompts: Sequence[Sequence[int]], decoding: Decoding) -> Iterator[tuple[Sequence[int], int]]:
    """Yield this rank's batches: the indexes of their prompts, and the longest answer in tokens. Every rank gets
    equally many batches.

    Behind a long prompt the model's context has less room than `Decoding.max_new_tokens`. A batch has only prompts with
    the same longest answer, because otherwise a long prompt would cut off the answers to the others, and the scores
    would depend on the size of a batch and on the number of ranks.
    """
    groups: dict[int, list[int]] = {}
    for row, prompt in enumerate(prompts):
        room = decoding.context - max(1, len(prompt))
        groups.setdefault(max(1, min(decoding.max_new_tokens, room)), []).append(row)
    lengths = [len(prompt) for prompt in prompts]
    for longest, rows in sorted(groups.items()):
        own = micro_batches(
            [[row] for row in rows],
            lengths,
            rank=gang.rank,
            world_size=gang.world_size,
            micro_batch_size=decoding.batch_size,
        )
        for batch in own:
            yield [row for sequence in batch for row in sequence], longest


def left_padded(prompts: Sequence[Sequence[int]], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return token ids and attention mask of ``prompts``, both of shape (B, T). Every prompt is padded on the left."""
    longest = max(len(prompt) for prompt in prompts)
    ids = torch.full((len(prompts), longest), pad)
    mask = torch.zeros_like(ids)
    for line, prompt in enumerate(prompts):
        ids[line, longest - len(prompt) :] = torch.as_tensor(prompt, dtype=torch.long)
        mask[line, longest - len(prompt) :] = 1
    return ids, mask


def _generate(
    engine: TrainingEngine, gang: Gang, prompts: Sequence[Sequence[int]], decoding: Decoding, longest: int
) -> list[list[int]]:
    """Generate an answer of at most ``longest`` tokens to each prompt, and return the token ids of the answers."""
    pad = int(decoding.tokenizer.eos_token_id)
    if not prompts and not engine.lockstep:
        return []
    # A rank that has no prompt left answers a dummy prompt, because under ZeRO-3 all ranks must run each forward pass.
    # An empty prompt is replaced by the end token, behind which a model begins a new text.
    ids, mask = left_padded([prompt or [pad] for prompt in prompts] or [[pad]], pad)
    width = ids.shape[1]
    config = HuggingFaceConfig(
        do_sample=False,
        num_beams=1,
        repetition_penalty=1.0,
        use_cache=True,
        max_new_tokens=longest,
        eos_token_id=list(decoding.stop_ids),
        pad_token_id=pad,
        suppress_tokens=list(decoding.suppressed) or None,
    )
    criteria: list[StoppingCriteria] = [_StopRequested(gang)]
    if decoding.suffix:
        criteria.append(_SuffixReached(decoding, width))
    with torch.no_grad():
        made = engine.model.generate(
            input_ids=ids.to(engine.device),
            attention_mask=mask.to(engine.device),
            generation_config=config,
            stopping_criteria=StoppingCriteriaList(criteria),
            synced_gpus=engine.lockstep,
        )
    return [row[width:].tolist() for row in made.cpu()][: len(prompts)]


def answer_text(ids: Sequence[int], decoding: Decoding) -> str:
    """Return the text of generated token ids, up to the first stop token or up to the suffix."""
    end = next((place for place, token in enumerate(ids) if token in decoding.stop_ids), len(ids))
    text = str(decoding.tokenizer.decode(ids[:end], skip_special_tokens=True))
    return text.split(decoding.suffix)[0] if decoding.suffix else text


class _StopRequested(StoppingCriteria):  # type: ignore[misc]  # transformers has no types here
    """Ends the generation of a batch once this rank knows that any rank has received SIGTERM. `Gang.check_stop` then
    raises StopAgreed before the next batch, or after the last one."""

    def __init__(self, gang: Gang) -> None:
        self._gang = gang

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        """Return for each of the B answers whether it must end: all of them after SIGTERM, otherwise none. transformers
        calls this after each token."""
        self._gang.note_progress()
        return torch.full((input_ids.shape[0],), self._gang.stop_requested(), device=input_ids.device)


class _SuffixReached(StoppingCriteria):  # type: ignore[misc]  # transformers has no types here
    """Ends an answer when the text of its last tokens contains the suffix."""

    def __init__(self, decoding: Decoding, width: int) -> None:
        self._decoding = decoding
        self._width = width
        suffix_ids = decoding.tokenizer(decoding.suffix, add_special_tokens=False)["input_ids"]
        self._tail = len(suffix_ids) + SUFFIX_SLACK

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        """Return for each of the B answers whether the text of its last tokens contains the suffix."""
        start = max(self._width, input_ids.shape[1] - self._tail)
        tails = self._decoding.tokenizer.batch_decode(input_ids[:, start:])
        return torch.tensor([self._decoding.suffix in tail for tail in tails], device=input_ids.device)
