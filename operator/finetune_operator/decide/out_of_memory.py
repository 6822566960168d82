"""Which attempt follows one that ran out of memory: the next one halves the micro-batch, which doubles the number of
gradient accumulation steps. The optimisation stays the same, because the global batch does.

Where a step had one micro-batch, two smaller ones can take more memory, because gradients accumulate: by the plan, Full
7B on 8 GPUs at ZeRO stage 1 with 512 tokens and recomputation goes from 30.3 to 37.8 GiB when 2 examples become 1.

A pure function from the failure and the attempts so far to a ruling. `rules.py` calls `rule_on`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from finetune_core.api.conditions import Reason
from finetune_core.contract import Phase
from finetune_core.planning.micro_batch import MicroBatch, micro_batch_of
from finetune_operator import messages
from finetune_operator.decide.verdict import Ruling, Verdict

HALVINGS_LIMIT: Final = 3
"""The micro-batch of a job is halved at most this number of times. Each try costs the start of an attempt, and a job
that does not fit with an eighth of its micro-batch seldom fits with less."""
HELPED_PHASES: Final = frozenset({"", Phase.TRAINING, Phase.EVALUATING})
"""Phases in which memory depends on the micro-batch. The empty phase is that of a trainer that has not reported yet."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryFailure:
    """An attempt that ran out of memory."""

    message: str
    """The sentence about the failure, for example `out of memory in phase Training`."""
    phase: str
    """Phase of the trainer in its last report; empty without a report."""
    packed: bool = False
    """Whether examples are packed into sequences. The number of micro-batches in a step then depends on their lengths.
    """
    in_node_memory: bool = False
    """Whether a job that computes on GPUs ran out of the pod's memory, which does not depend on the micro-batch."""
    node: str = ""
    """Name of the node of the pod that failed."""


def rule_on(
    failure: MemoryFailure, *, planned: int, halvings: int, share: int, retries_left: int, advice: str
) -> Ruling:
    """Return the ruling on an attempt that ran out of memory: another attempt follows where a smaller micro-batch can
    help, and else the job ends.

    ``halvings`` is how many earlier attempts of the job ran out of memory and were followed by another one. ``planned``
    and ``share`` are those of `micro_batch_of`. ``retries_left`` is how many more attempts may be charged before
    `runPolicy.maxRetries` ends the job. ``advice`` is the sentence that says which fields of the job to change so that
    it fits.

    The first such attempt is charged, and those that follow it are free: they are one search, which HALVINGS_LIMIT
    bounds, for the one thing that is wrong with the job.
    """
    tried = micro_batch_of(planned, halvings=halvings, share=share)
    why = _why_final(failure, tried, halvings)
    # The first attempt of a search is charged. Where it uses up the retries, no other attempt would follow, and the job
    # ends with what to change.
    if why or (not halvings and retries_left <= 0):
        message = messages.memory_not_enough(failure.message, why, advice)
        return Ruling(verdict=Verdict.PERMANENT, reason=Reason.OUT_OF_MEMORY, message=message, node=failure.node)
    following = micro_batch_of(planned, halvings=halvings + 1, share=share)
    return Ruling(
        verdict=Verdict.FREE if halvings else Verdict.CHARGED,
        reason=Reason.OUT_OF_MEMORY,
        message=messages.micro_batch_halved(
            failure.message,
            tried.size,
            following.size,
            steps=None if failure.packed else following.accumulation_steps,
            time=halvings + 1,
            limit=HALVINGS_LIMIT,
        ),
        node=failure.node,
    )


def _why_final(failure: MemoryFailure, tried: MicroBatch, halvings: int) -> str:
    """Return why no smaller micro-batch helps; empty where one may help."""
    if failure.in_node_memory:
        return messages.NODE_MEMORY
    if failure.phase not in HELPED_PHASES:
        return messages.memory_of_phase(failure.phase)
    if tried.size == 1:
        return messages.SMALLEST_MICRO_BATCH
    if halvings >= HALVINGS_LIMIT:
        return messages.halved_too_often(halvings, tried.size)
    return ""
