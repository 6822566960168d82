"""Counts what a micro-batch asks of a GPU: kernels, bytes that are read and written, and bytes that are kept for the
backward pass.

The model is on the meta device, where operators compute shapes only. So models of any size are counted in seconds, and
the counts are those of a GPU as far as each operator of ATen is one kernel. The counts of a layer are the differences
between a model with two layers and a model with one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten
from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM, masking_utils

from finetune_core.api.method import LoRASpec
from finetune_trainer.data.batches import Batch
from finetune_trainer.engine.plain_engine import PlainEngine
from finetune_trainer.kernels import rms_norm
from finetune_trainer.kernels.install import use_fused_kernels
from finetune_trainer.kernels.parts import KernelPart
from finetune_trainer.loss.objective import Objective
from finetune_trainer.model.adapters import add_adapters
from finetune_trainer.model.packed_attention import install, note_borders
from tests.trainer.engine_runs import PLAIN, EngineRun
from tests.trainer.plain_loop import DENSE

VIEWS = frozenset(
    {
        *("view", "_unsafe_view", "_reshape_alias", "reshape", "squeeze", "unsqueeze", "expand", "as_strided", "set_"),
        *("t", "transpose", "permute", "slice", "select", "narrow", "split", "unsafe_split", "split_with_sizes"),
        *("unbind", "detach", "alias", "lift_fresh", "empty", "empty_like"),
    }
)
"""Operators without a kernel: they make other views of memory, or only reserve memory."""
LIKE = frozenset({"zeros_like", "ones_like", "full_like", "new_zeros", "new_ones", "new_full"})
"""Operators that need the shape of their first argument, and don't read its numbers."""
CHOSEN = frozenset({"gather", "scatter_", "scatter_add_", "nll_loss_forward"})
"""Operators that read or write one number of a row, which an index names. Their first argument is the whole tensor."""
PRODUCTS = frozenset({"mm", "bmm", "addmm", "addmm_", "baddbmm"})
LARGE_PRODUCT = 2 * 1000 * 1000
"""Number of FLOPs of a token from which a product of matrices counts as one that computes, and not as one that moves
memory. The products with LoRA's matrices A and B are below."""
ATTENTION = "counted_attention"


@dataclass(frozen=True)
class Counts:
    """What a micro-batch or a layer asks for."""

    kernels: int
    """Number of kernels, forward and backward."""
    moved: int
    """Bytes that all kernels read and write, except for large products and for attention."""
    kept: int
    """Bytes that autograd keeps between forward and backward pass, without parameters."""
    names: Counter[str]
    """The number of kernels by operator."""

    def __sub__(self, other: Counts) -> Counts:
        names = Counter(self.names)
        names.subtract(other.names)
        return Counts(self.kernels - other.kernels, self.moved - other.moved, self.kept - other.kept, +names)


def _attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(query)


def _attention_backward(
    gradient: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mixed: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


_LIBRARY = torch.library.Library("counted", "DEF")
_LIBRARY.define("attention(Tensor query, Tensor key, Tensor value) -> Tensor")
_LIBRARY.define(
    "attention_backward(Tensor gradient, Tensor query, Tensor key, Tensor value, Tensor mixed)"
    " -> (Tensor, Tensor, Tensor)"
)


def _norm(x: torch.Tensor, _shape: Any, _weight: Any, _epsilon: float) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(x), torch.empty((*x.shape[:-1], 1), dtype=torch.float32, device=x.device)


_LIBRARY.impl("attention", _attention, "Meta")
_LIBRARY.define("rms_norm(Tensor x, int[] shape, Tensor? weight, float epsilon) -> (Tensor, Tensor)")
_LIBRARY.impl("rms_norm", _norm, "Meta")
_LIBRARY.impl("attention_backward", _attention_backward, "Meta")


class _Attention(torch.autograd.Function):  # type: ignore[misc]  # torch has no types here
    """Attention as one kernel in each direction, as FlashAttention is. On the meta device, torch would choose another
    kernel than on a GPU."""

    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> Any:
        mixed = torch.ops.counted.attention(query, key, value)
        ctx.save_for_backward(query, key, value, mixed)
        return mixed

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        return torch.ops.counted.attention_backward(gradient, *ctx.saved_tensors)


def _counted_attention(_module: Any, query: Any, key: Any, value: Any, _mask: Any, **_options: Any) -> Any:
    return _Attention.apply(query, key, value).transpose(1, 2).contiguous(), None


AttentionInterface.register(ATTENTION, _counted_attention)


class Counting(TorchDispatchMode):  # type: ignore[misc]  # torch has no types here
    """Counts the kernels that run, and the bytes that they move, as in `Counts`, for ``tokens`` tokens."""

    def __init__(self, tokens: int) -> None:
        super().__init__()
        self._large = LARGE_PRODUCT * tokens
        self.names: Counter[str] = Counter()
        self.moved = 0

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = operator(*args, **(kwargs or {}))
        name = operator.overloadpacket.__name__
        if name in VIEWS:
            return result
        self.names[name] += 1
        # Where beta is 0, the first argument of `addmm` is not read. The place for a result is written only.
        first = 1 if name == "addmm" and not (kwargs or {}).get("beta", 1) else 0
        read, written = _tensors(args[1 if name in LIKE else first :]), _tensors(result)
        if name in CHOSEN:
            read, written = read[1:], [tensor for tensor in read[1:] if not tensor.is_floating_point()]
        if name in PRODUCTS:
            left, right = read[-2:]
            if 2 * left.shape[-2] * left.shape[-1] * right.shape[-1] > self._large:
                return result
        if not name.startswith("attention"):
            self.moved += sum(value.numel() * value.element_size() for value in (*read, *written))
        return result


def _tensors(values: Any) -> list[torch.Tensor]:
    return [value for value in tree_flatten(values)[0] if isinstance(value, torch.Tensor)]


@contextmanager
def _on_meta() -> Iterator[None]:
    """Keep transformers from looking for packed examples in position ids, which needs their values. In a micro-batch
    of a training transformers does not look for them (`model/packed_attention.py`)."""
    find = masking_utils.find_packed_sequence_indices
    masking_utils.find_packed_sequence_indices = lambda _positions: None
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = find


@contextmanager
def _with_norms_as_on_cuda() -> Iterator[None]:
    """Count the norm of ATen as the one kernel that it is on CUDA. On the meta device ATen computes it by eight
    operators, as on the CPU."""
    aten = rms_norm.ATEN
    rms_norm.ATEN = SimpleNamespace(
        _fused_rms_norm=torch.ops.counted.rms_norm, _fused_rms_norm_backward=aten._fused_rms_norm_backward
    )
    try:
        yield
    finally:
        rms_norm.ATEN = aten


class Passes(NamedTuple):
    """The two passes of a micro-batch."""

    loss: Callable[[Batch], torch.Tensor]
    backward: Callable[[torch.Tensor], object]


def with_kernels(model: Any, *, plain: Collection[KernelPart] = ()) -> Passes:
    """Return the passes of ``model``, which trains with the trainer's kernels except for the parts ``plain``."""
    use_fused_kernels(model, plain=plain)
    loss = partial(Objective(model, fused_head=KernelPart.HEAD_LOSS not in plain).loss, model)
    return Passes(loss, torch.Tensor.backward)


def with_engine(model: Any) -> Passes:
    """Return the passes of ``model`` as the product computes them in one process, with the plain engine."""
    run = EngineRun(method="Full", parts=((PLAIN, 1),), precision="bf16")
    engine = PlainEngine(model, run.optimization(PLAIN), torch.device("meta"))
    engine.train()
    return Passes(engine.loss, partial(engine.backward, last=True))


def count(
    layers: int,
    *,
    lora: bool,
    make: Callable[[Any], Passes] = with_kernels,
    dropout: str = "0",
    length: int = 512,
    batch_size: int = 8,
    **shape: int,
) -> Counts:
    """Return the counts of a micro-batch for a model of Llama-2-7B's shape with ``layers`` layers, in bf16. ``make``
    makes the passes of the model. ``shape`` are fields of the configuration."""
    sizes = {"vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32}
    config = LlamaConfig(**{**sizes, **shape}, num_hidden_layers=layers, tie_word_embeddings=False)
    config._attn_implementation = ATTENTION
    with torch.device("meta"):
        model: Any = LlamaForCausalLM(config).to(torch.bfloat16)
    model.config.use_cache = False
    if lora:
        spec = LoRASpec(rank=8, alpha=16, dropout=dropout)
        model = add_adapters(model, spec, targets=DENSE, seed=1, base_name="counted").to("meta")
    own = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers())}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage
        return tensor

    install()
    with _on_meta():
        passes = make(model)
    model.train()
    numbers = torch.zeros(batch_size, length, dtype=torch.long, device="meta")
    flat = numbers.flatten()
    batch = Batch(numbers, None, flat, flat, numbers, len(flat), len(flat))
    counting = Counting(len(flat))
    # On the meta device no value can be read, so on a GPU the CPU waits for nothing in these passes.
    with counting, _with_norms_as_on_cuda():
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = passes.loss(batch)
        held = sum(storage.nbytes() for storage in kept.values())
        kept.clear()
        passes.backward(loss)
    note_borders(None)
    return Counts(counting.names.total(), counting.moved, held, counting.names)


def count_layer(**options: Any) -> Counts:
    """Return the counts of one layer: `count` of two layers less `count` of one."""
    return count(2, **options) - count(1, **options)


def count_norm(norm: Callable[..., torch.Tensor], form: rms_norm.Form) -> Counts:
    """Return the counts of ``norm``, a function as `rms_norm`, for 1000 tokens of 1000 features in bf16, forward and
    backward, with a frozen weight."""
    x = torch.zeros(1000, 1000, dtype=torch.bfloat16, device="meta", requires_grad=True)
    weight = torch.zeros(1000, dtype=torch.bfloat16, device="meta") if form is not rms_norm.Form.BARE else None
    counting = Counting(len(x))
    with counting, _with_norms_as_on_cuda():
        output = norm(x, weight, 1e-6, form)
        output.backward(torch.empty_like(output))
    return Counts(counting.names.total(), counting.moved, 0, counting.names)
