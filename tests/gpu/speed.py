"""Sections that measure speed and memory of Llama-2-7B with random weights: LoRA, Full, snapshots and generation."""

from __future__ import annotations

import math
import os
import statistics
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch.profiler import ProfilerActivity, profile
from transformers import PreTrainedTokenizerFast

from finetune_core.planning.flops import ModelShape, peak_flops, training_flops, utilisation
from finetune_trainer.data.batches import Batch
from finetune_trainer.engine.fragment_snapshot import FragmentSnapshots
from finetune_trainer.evaluation.generation import Decoding, generate_answers
from finetune_trainer.model.load import DTYPES
from tests.gpu.expected_memory import SOURCE, expected_peak_bytes
from tests.gpu.models import (
    PAD,
    Prepared,
    batch_of,
    examples_of,
    gpu_name,
    joined_gang,
    prepare,
    random_example,
    random_model,
    setup_for,
    shape_for,
)
from tests.gpu.report import Check, Figure
from tests.gpu.settings import FULL_LONG, FULL_SHORT, LLAMA_2_7B, LONG, PACKED, SHORT, Setup
from tests.gpu.training import synchronize, timed_steps, train_step

GIB = 2**30
WARM_UP = 2
STEPS = 8
RATE = 1e-5
STALL_SECONDS = 0.3
"""For how long a snapshot of LoRA's training state may stall the training."""
COPY_SECONDS = 0.005
"""For how long the copy of a micro-batch of a few hundred kilobytes may hold the CPU. A copy that waits holds it until
the GPU has computed the backward pass before, at least ten times as long."""
MICRO_BATCHES = 3
PLACES = 12
KINDS = {
    "matrix": ("gemm", "cutlass", "xmma", "nvjet", "cublas", "::mm", "addmm", "::bmm"),
    "attention": ("flash", "fmha", "attention", "sdpa"),
    "copy": ("memcpy", "memset", "copy"),
}
"""Parts of the names of kernels, by kind. A kernel with none of them is elementwise work or a reduction."""
KERNEL_TABLE = "lora-512-kernels.txt"


def lora_512(check: Check) -> None:
    """Measure LoRA with 8 sequences of 512 tokens, the waits of the CPU, a copy to the GPU, and a snapshot."""
    prepared, batch = _measure(check, SHORT)
    _count_waits(check, prepared, batch)
    _copy_while_computing(check, prepared, batch)
    _count_kernels(check, prepared, batch)
    seconds = _snapshot(check, prepared)
    if not check.dry:
        check.expect(
            f"a snapshot of LoRA stalls for less than {STALL_SECONDS} s", seconds < STALL_SECONDS, seconds=seconds
        )
    prepared.engine.close()


def lora_4096(check: Check) -> None:
    """Measure LoRA with one sequence of 4096 tokens: one example, and packed examples."""
    for setup in (LONG, PACKED):
        prepared, _ = _measure(check, setup)
        prepared.engine.close()


def full(check: Check) -> None:
    """Measure Full with 8 sequences of 512 tokens, and with one of 4096."""
    prepared, _ = _measure(check, FULL_SHORT)
    _measure_steps(check, FULL_LONG, prepared)
    _snapshot(check, prepared)
    prepared.engine.close()


def _measure(check: Check, wanted: Setup) -> tuple[Prepared, Batch]:
    """Make the training of ``wanted`` and measure its steps. Return the engine and the measured micro-batch."""
    setup, gang = setup_for(check, wanted), joined_gang(dry=check.dry)
    began, before = time.perf_counter(), _memory(gang.device)
    model = random_model(shape_for(check, LLAMA_2_7B), DTYPES[setup.precision], gang.device)
    prepared = prepare(check, setup, model)
    synchronize(gang.device)
    seconds = time.perf_counter() - began
    check.say(f"{wanted.case}: engine", seconds=seconds, before=before, after=_memory(gang.device))
    return prepared, _measure_steps(check, wanted, prepared)


def _measure_steps(check: Check, wanted: Setup, prepared: Prepared) -> Batch:
    """Measure steps of ``wanted`` with an engine that is ready, and return their micro-batch."""
    setup, shape, gang = setup_for(check, wanted), shape_for(check, LLAMA_2_7B), joined_gang(dry=check.dry)
    engine, device = prepared.engine, gang.device
    sequences = examples_of(setup, vocabulary=shape.vocab_size)
    batch = batch_of(sequences, packed=setup.packed_tokens is not None)
    warm_up = list(timed_steps(engine, gang, [batch], RATE, WARM_UP))
    first = _memory(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    times = list(timed_steps(engine, gang, [batch], RATE, 1 if check.dry else STEPS))
    seconds = statistics.median(times)
    memory = _memory(device)
    loss = train_step(engine, gang, [batch], RATE).loss
    lengths = [len(example.ids) for sequence in sequences for example in sequence]
    counted = _counted(engine.model, adapters=setup.method == "LoRA")
    flops = training_flops(counted, sum(lengths), sum(length**2 for length in lengths))
    name = gpu_name(device)
    figures: dict[str, Figure] = {
        "gpu": name,
        "tokens_per_second": sum(lengths) / seconds,
        "tflops": flops / seconds / 1e12,
        "mfu": utilisation(flops, seconds, 1, peak_flops(name)) if name is not None else None,
        "step_seconds": seconds,
        "slowest_step_seconds": max(times),
        "warm_up_seconds": sum(warm_up),
        "peak_gib_until_warm": first.get("peak_gib"),
        "examples": len(lengths),
        "attention": prepared.attention.kernel.value,
        "notices": prepared.attention.notices,
        "loss": loss,
        **memory,
        **_issue(prepared, batch),
    }
    if name is not None:
        total = sum(parameter.numel() for parameter in engine.model.parameters())
        expected = expected_peak_bytes(setup, shape)
        figures |= {"expected_peak_gib": expected / GIB, "expected_from": SOURCE}
        figures["bytes_a_parameter"] = memory["peak_gib"] * GIB / total
    check.say(wanted.case, **figures)
    check.expect(f"{wanted.method} {wanted.case}: the loss is finite", math.isfinite(loss), loss=loss)
    return batch


def _counted(model: Any, *, adapters: bool) -> ModelShape:
    """Return the numbers that the FLOPs of ``model`` depend on, as `reporting/meter.py` counts them."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    weights = sum(parameter.numel() for name, parameter in model.named_parameters() if "lora_" not in name)
    return ModelShape(
        layers=inner.config.num_hidden_layers,
        attention_width=inner.config.hidden_size,
        matrix_parameters=weights - inner.get_input_embeddings().weight.numel(),
        trained_parameters=trained,
        adapters=adapters,
    )


def _memory(device: torch.device) -> dict[str, float]:
    """Return the GPU memory in GiB that is allocated, and the most that was allocated and reserved since the counters
    were reset. On the CPU the mapping is empty."""
    if device.type != "cuda":
        return {}
    return {
        "allocated_gib": torch.cuda.memory_allocated(device) / GIB,
        "peak_gib": torch.cuda.max_memory_allocated(device) / GIB,
        "reserved_gib": torch.cuda.max_memory_reserved(device) / GIB,
    }


def _issue(prepared: Prepared, batch: Batch) -> dict[str, float]:
    """Return the seconds until the CPU has issued a forward and a backward pass, and until the GPU has computed them.
    Where the two are equal, the CPU holds the GPU up, or the CPU waits for the GPU inside of the passes."""
    engine = prepared.engine
    synchronize(engine.device)
    began = time.perf_counter()
    factor = 1 / max(1, batch.tokens)
    loss = engine.loss(batch.to(engine.device), factor=factor)
    engine.backward(loss * factor, last=True)
    issued = time.perf_counter() - began
    synchronize(engine.device)
    done = time.perf_counter() - began
    engine.discard_gradient()
    return {"issue_seconds": issued, "computed_seconds": done}


def _count_waits(check: Check, prepared: Prepared, batch: Batch) -> None:
    """Count how often the CPU waits for the GPU in a step, with one and with several micro-batches, and where."""
    gang = joined_gang(dry=check.dry)
    if gang.device.type != "cuda":
        check.say("waits", waits_per_micro_batch=None, waits_per_step=None, places={})
        return
    counts = {}
    places: Counter[str] = Counter()
    for number in (1, MICRO_BATCHES):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                train_step(prepared.engine, gang, [batch] * number, RATE)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        found = [warning for warning in caught if "synchroniz" in str(warning.message)]
        counts[number] = len(found)
        places = Counter(f"{'/'.join(Path(warning.filename).parts[-3:])}:{warning.lineno}" for warning in found)
    per_micro_batch = (counts[MICRO_BATCHES] - counts[1]) / (MICRO_BATCHES - 1)
    check.say(
        "waits",
        gpu=gpu_name(gang.device),
        waits_per_micro_batch=per_micro_batch,
        waits_per_step=counts[1] - per_micro_batch,
        places=dict(places.most_common(PLACES)),
    )


def _copy_while_computing(check: Check, prepared: Prepared, batch: Batch) -> None:
    """Measure how long the CPU takes to copy a micro-batch to the GPU while the GPU computes: the GPU is given a
    backward pass first. PyTorch's own count of waits does not see a copy that waits."""
    engine = prepared.engine
    batch.to(engine.device)
    synchronize(engine.device)
    factor = 1 / max(1, batch.tokens)
    loss = engine.loss(batch.to(engine.device), factor=factor)
    engine.backward(loss * factor, last=True)
    issued = time.perf_counter()
    batch.to(engine.device)
    copied = time.perf_counter() - issued
    synchronize(engine.device)
    computed = time.perf_counter() - issued
    engine.discard_gradient()
    check.say("copy", copy_seconds=copied, computing_seconds=computed)
    if not check.dry:
        check.expect(
            "the copy of a micro-batch does not wait for the GPU", copied < COPY_SECONDS, seconds=copied, gpu=computed
        )


def _count_kernels(check: Check, prepared: Prepared, batch: Batch) -> None:
    """Count the kernels of a step, and add up their time by kind. On the CPU these are torch's operators. Where the
    variable OUT names a folder, a table of the kernels that take longest goes into a file there."""
    gang = joined_gang(dry=check.dry)
    gpu = gang.device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if gpu else ProfilerActivity.CPU]) as seen:
        train_step(prepared.engine, gang, [batch], RATE)
        synchronize(gang.device)
    spent: dict[str, float] = dict.fromkeys((*KINDS, "other"), 0.0)
    events = seen.key_averages()
    for event in events:
        name = event.key.lower()
        kind = next((kind for kind, parts in KINDS.items() if any(part in name for part in parts)), "other")
        spent[kind] += (event.self_device_time_total if gpu else event.self_cpu_time_total) / 1e3
    layers = shape_for(check, LLAMA_2_7B).num_hidden_layers
    count = sum(event.count for event in events)
    check.say("kernels", kernels=count, kernels_a_layer=count / layers, milliseconds=spent)
    if folder := os.environ.get("OUT"):
        order = "self_cuda_time_total" if gpu else "self_cpu_time_total"
        (Path(folder) / KERNEL_TABLE).write_text(events.table(sort_by=order, row_limit=40), encoding="utf-8")


def _snapshot(check: Check, prepared: Prepared) -> float:
    """Take a snapshot of the training state as the trainer takes one, and return for how many seconds it stalls the
    training. The memory of the snapshot is new, as that of the first checkpoint of a run."""
    snapshots = FragmentSnapshots(prepared.engine, rank=0, world_size=1)
    synchronize(prepared.engine.device)
    began = time.perf_counter()
    snapshots.take()
    seconds = time.perf_counter() - began
    size = snapshots.bytes_of_one
    check.say("snapshot", stall_seconds=seconds, gigabytes=size / 1e9, gb_per_second=size / 1e9 / seconds)
    return seconds


def generation(check: Check) -> None:
    """Measure how fast answers are generated, as an evaluation generates them, at several batch sizes."""
    gang, shape = joined_gang(dry=check.dry), shape_for(check, LLAMA_2_7B)
    setup = setup_for(check, SHORT)
    prompt, answer = (16, 4) if check.dry else (128, 64)
    prepared = prepare(check, setup, random_model(shape, DTYPES[setup.precision], gang.device))
    tokenizer = _tokenizer(shape.vocab_size)
    for size in (2, 4) if check.dry else (8, 32, 64):
        prompts = [[int(token) for token in random_example(prompt, seed).ids] for seed in range(size)]
        decoding = Decoding(
            tokenizer=tokenizer,
            stop_ids=[PAD],
            suffix="",
            # Without its end token the model writes answers of the full length.
            suppressed=[PAD],
            batch_size=size,
            max_new_tokens=answer,
            context=shape.max_position_embeddings,
        )
        synchronize(gang.device)
        began = time.perf_counter()
        answers = [
            text for made in generate_answers(prepared.engine, gang, prompts, decoding) for text in made.values()
        ]
        seconds = time.perf_counter() - began
        lengths = {len(text.split()) for text in answers}
        check.say(
            f"{size} prompts",
            gpu=gpu_name(gang.device),
            tokens_per_second=size * answer / seconds,
            milliseconds_a_token=seconds / answer * 1e3,
            **_memory(gang.device),
        )
        check.expect(
            f"{size} prompts get answers of {answer} tokens",
            len(answers) == size and lengths == {answer},
            answers=len(answers),
            lengths=sorted(lengths),
        )
    prepared.engine.close()


def _tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """Return a tokenizer whose tokens are the words `t0`, `t1` and so on. Token PAD ends a text."""
    words = {f"t{number}": number for number in range(vocabulary)}
    inner = Tokenizer(WordLevel(words, unk_token="t0"))
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="t0", eos_token=f"t{PAD}")
