"""Models with random weights, batches of random tokens, and the trainer's engine for them, as the trainer itself makes
an engine (`preparation.py` and `train.py`).

The weights of large models are made on the GPU, because nothing may be downloaded, and copying 13 GB takes long.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from finetune_core.contract import RunConfig
from finetune_trainer.data.batches import Batch, collate, dropout_seed
from finetune_trainer.data.examples import Example
from finetune_trainer.engine.checks import ChosenAttention, check_model
from finetune_trainer.engine.interface import TrainingEngine
from finetune_trainer.engine.making import make_engine
from finetune_trainer.model.adapters import add_adapters
from finetune_trainer.model.attention import DeviceAbilities, Kernel, ModelAbilities, kernels
from finetune_trainer.model.load import enable_gradient_checkpointing, switch_off_dropout
from finetune_trainer.model.packed_attention import install
from finetune_trainer.ranks.gang import Gang
from finetune_trainer.ranks.process import select_device
from tests.gpu.report import Check
from tests.gpu.settings import SHORT, TINY, Setup, Shape, run_config

PAD = 2
"""Token id of padding, and of the end of an answer. Random tokens are larger."""
DENSE = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
PROMPT_SHARE = 3
"""One token in PROMPT_SHARE of each example belongs to its prompt, which is not learned."""
SMALLEST_EXAMPLE = 8


@dataclass(frozen=True)
class Prepared:
    """An engine that is ready to train, and how its attention is computed."""

    engine: TrainingEngine
    attention: ChosenAttention


@cache
def joined_gang(*, dry: bool) -> Gang:
    """Return the gang of this process, which has one rank. The first call joins the rendezvous."""
    config = run_config(SHORT, dry=dry)
    return Gang(device=select_device(config.world, precision=config.optimization.precision))


def shape_for(check: Check, shape: Shape) -> Shape:
    """Return ``shape``, or the tiny shape in a dry run."""
    return TINY if check.dry else shape


def setup_for(check: Check, setup: Setup) -> Setup:
    """Return ``setup``, in a dry run with fewer and shorter sequences, and without bf16."""
    if not check.dry:
        return setup
    length = 24 if setup.length <= 512 else 96
    return Setup(
        method=setup.method,
        stage=setup.stage,
        rows=min(setup.rows, 2),
        length=length,
        packed_tokens=setup.packed_tokens and 16,
        precision="fp32",
        recompute=setup.recompute,
    )


def config_of(shape: Shape) -> LlamaConfig:
    """Return the configuration of a Llama model of ``shape``. Input embedding and output head have weights of their
    own, as in Llama-2-7B."""
    return LlamaConfig(**asdict(shape), tie_word_embeddings=False, bos_token_id=1, eos_token_id=PAD, use_cache=False)


def random_model(shape: Shape, dtype: torch.dtype, device: torch.device, *, seed: int = 5) -> LlamaForCausalLM:
    """Return a model of ``shape`` with random weights, which are made on ``device``, and prepared as `load_base` of the
    trainer prepares a loaded model."""
    before = torch.get_default_dtype()
    torch.manual_seed(seed)
    torch.set_default_dtype(dtype)
    try:
        with device:
            model = LlamaForCausalLM(config_of(shape))
    finally:
        torch.set_default_dtype(before)
    switch_off_dropout(model)
    install()
    return model


def with_method(model: Any, config: RunConfig) -> Any:
    """Return ``model`` ready for the method of ``config``: with recomputation, and with LoRA adapters."""
    if config.optimization.gradient_checkpointing:
        enable_gradient_checkpointing(model)
    if config.lora is None:
        return model
    return add_adapters(model, config.lora, targets=DENSE, seed=config.optimization.seed, base_name="random")


def abilities(check: Check, config: RunConfig, *, packing: bool) -> list[Kernel]:
    """Return the attention kernels that the trainer would try for a Llama model, the fastest first."""
    with torch.device("meta"):
        structure = LlamaForCausalLM(config_of(TINY))
    return kernels(
        config.optimization.attention,
        ModelAbilities.of(structure),
        DeviceAbilities.of(joined_gang(dry=check.dry).device),
        config.optimization.precision,
        packing=packing,
    )


def prepare(check: Check, setup: Setup, model: Any, *, is_tuned: bool = False) -> Prepared:
    """Return the trainer's engine for ``model``, after the trainer's own checks of the model. ``is_tuned`` says that
    ``model`` went through `with_method` already."""
    config, device = run_config(setup, dry=check.dry), joined_gang(dry=check.dry).device
    tuned = model if is_tuned else with_method(model, config)
    engine = make_engine(tuned, config.optimization, device)
    packing = setup.packed_tokens is not None
    attention = check_model(
        engine,
        [random_example(24, seed) for seed in (1, 2)],
        pad=PAD,
        packing=packing,
        kernels=abilities(check, config, packing=packing),
    )
    return Prepared(engine, attention)


def random_example(tokens: int, seed: int, *, vocabulary: int = TINY.vocab_size) -> Example:
    """Return an example of ``tokens`` random tokens, of which the last two thirds are learned."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(PAD + 1, vocabulary, (tokens,), generator=generator).tolist()
    return Example(ids, [(tokens // PROMPT_SHARE, tokens)])


def examples_of(setup: Setup, *, vocabulary: int, seed: int = 0) -> list[list[Example]]:
    """Return the examples of a micro-batch of ``setup``, one list for each sequence. Every sequence is full. Packed
    examples have from half to one and a half of the average length."""
    generator = torch.Generator().manual_seed(seed)
    sequences = []
    for row in range(setup.rows):
        room, sizes = setup.length, []
        while room:
            share = 0.5 + float(torch.rand(1, generator=generator))
            size = room if setup.packed_tokens is None else max(SMALLEST_EXAMPLE, int(setup.packed_tokens * share))
            sizes.append(size if room - size >= SMALLEST_EXAMPLE else room)
            room -= sizes[-1]
        sequences.append(
            [random_example(size, 1000 * row + place + seed, vocabulary=vocabulary) for place, size in enumerate(sizes)]
        )
    return sequences


def batch_of(sequences: Sequence[Sequence[Example]], *, packed: bool, step: int = 1) -> Batch:
    """Return the micro-batch of ``sequences``."""
    numbered = [
        [(example, dropout_seed(1, step, 1000 * row + place)) for place, example in enumerate(sequence)]
        for row, sequence in enumerate(sequences)
    ]
    return collate(numbered, pad=PAD, packed=packed)


def gpu_name(device: torch.device) -> str | None:
    """Return the name of the GPU, or None on the CPU."""
    return str(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
