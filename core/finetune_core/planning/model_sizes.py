"""The sizes of a model: which linear layers, embeddings and norms it has, and so how many parameters of each kind.

`model_families.py` reads them out of a `config.json`. `memory.py`, `activations.py` and `speed.py` compute with them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property

from finetune_core.errors import UserError
from finetune_core.target_modules import ALL_LINEAR, FIELD, compile_entry, is_pattern


class Part(StrEnum):
    """The part of a model that a linear layer belongs to."""

    ATTENTION = "attention"
    FEED_FORWARD = "feed-forward"
    ROUTER = "router"
    EXPERTS = "experts"


class NormKind(StrEnum):
    """How a layer's input is normalised."""

    RMS = "RMSNorm"
    """Divided by the root of the mean square, with one factor for each feature (Zhang and Sennrich 2019)."""
    LAYER = "LayerNorm"
    """With mean and variance, and a factor and an offset for each feature (Ba et al. 2016)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Linear:
    """A linear layer, or the same linear layer of all experts of a layer of the model."""

    name: str
    """Name below the layer, for example `self_attn.q_proj`."""
    inputs: int
    outputs: int
    part: Part
    biased: bool = False
    experts: int = 1
    """Number of experts that have such a layer."""

    @property
    def elements(self) -> int:
        """Number of elements of the tensor of weights, over all experts and without biases."""
        return self.experts * self.inputs * self.outputs

    @property
    def parameters(self) -> int:
        """Number of parameters, over all experts."""
        return self.elements + self.experts * self.biased * self.outputs

    def adapter_parameters(self, rank: int) -> int:
        """Return the number of parameters of a LoRA adapter: A has ``rank`` rows of inputs, B has ``rank`` columns of
        outputs (Hu et al. 2021). peft gives each expert an adapter of its own."""
        return self.experts * rank * (self.inputs + self.outputs)


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerSizes:
    """One layer of the model."""

    linears: tuple[Linear, ...]
    norm_widths: tuple[int, ...]
    """Number of features of each norm over the hidden states."""
    head_norm_widths: tuple[int, ...] = ()
    """Number of features of each norm over queries and keys."""

    def parameters(self, norm: NormKind) -> int:
        """Return the number of parameters of the layer, whose norms are of the kind ``norm``."""
        norms = (sum(self.norm_widths)) * (2 if norm is NormKind.LAYER else 1) + sum(self.head_norm_widths)
        return sum(linear.parameters for linear in self.linears) + norms

    @property
    def experts(self) -> int:
        """Number of experts; 1 where the layer has none."""
        return max((linear.experts for linear in self.linears), default=1)


@dataclass(frozen=True, kw_only=True)
class ModelSizes:
    """The sizes of a causal language model. Counts are computed once, because a plan asks for them thousands of
    times."""

    family: str
    """`model_type` of the configuration."""
    vocabulary: int
    hidden: int
    heads: int
    key_value_heads: int
    head_width: int
    feed_forward: int
    """Width of the feed-forward network between its linear layers: of one expert where the layers have experts."""
    active_experts: int
    """Number of experts that compute one token; 0 where the model has none."""
    shared_feed_forward: int
    """Width of the expert that computes every token; 0 where there is none."""
    tied: bool
    """Whether the output head has the weight of the input embedding."""
    norm: NormKind
    layers: tuple[LayerSizes, ...]
    head_biased: bool = False
    wide_norms: bool = False
    """Whether norms multiply with their factors in fp32, as in Gemma."""
    window: int | None = None
    """Number of tokens that a sliding window of the attention has, in some or all layers. None without one."""
    positions: int = 0
    """Number of learned positions; 0 where positions are computed."""
    context: int | None = None
    """Length in tokens of the longest text that the model can read. None where the configuration has no limit."""
    prefix: str = "model.layers"
    """Where the layers are in the names of the modules."""

    @property
    def embedding_parameters(self) -> int:
        """Number of parameters of the input embedding, with learned positions."""
        return (self.vocabulary + self.positions) * self.hidden

    @property
    def head_parameters(self) -> int:
        """Number of parameters that the output head has of its own."""
        bias = self.vocabulary if self.head_biased else 0
        return bias + (0 if self.tied else self.vocabulary * self.hidden)

    @cached_property
    def linears(self) -> Mapping[Linear, int]:
        """The different linear layers, and how many layers of the model have each of them."""
        return Counter(linear for layer in self.layers for linear in layer.linears)

    @cached_property
    def experts(self) -> tuple[tuple[int, ...], ...]:
        """For each layer of the model the numbers of elements of its tensors of experts, in the order of the forward
        pass: `gate_up_proj` and `down_proj`. Empty tuples where layers have no experts."""
        return tuple(
            tuple(linear.elements for linear in layer.linears if linear.part is Part.EXPERTS) for layer in self.layers
        )

    @cached_property
    def quantizable(self) -> int:
        """Number of elements of the weights that NF4 holds in 4 bits: those of all linear layers but routers."""
        return sum(count * linear.elements for linear, count in self.linears.items() if linear.part is not Part.ROUTER)

    @cached_property
    def parameters(self) -> int:
        """Number of all parameters."""
        return sum(self.parameters_by_kind.values())

    @cached_property
    def matrix_parameters(self) -> int:
        """Number of parameters that every token is multiplied with: those of the layers, without experts that do not
        compute the token, and those of the output head."""
        total = self.vocabulary * self.hidden
        for linear, count in self.linears.items():
            share = self.active_experts / linear.experts if linear.experts > 1 else 1.0
            total += count * int(linear.parameters * share)
        return total

    @cached_property
    def largest_tensor(self) -> int:
        """Number of parameters of the largest tensor. transformers holds the weights of all experts of a layer in one
        tensor."""
        return max(
            self.vocabulary * self.hidden,
            *(linear.elements for linear in self.linears),
        )

    @cached_property
    def parameters_by_kind(self) -> Mapping[str, int]:
        """Number of parameters of each kind: embedding, head, norms, and the parts of the layers."""
        found = {"embedding": self.embedding_parameters, "head": self.head_parameters}
        for part in Part:
            found[part.value] = sum(
                count * linear.parameters for linear, count in self.linears.items() if linear.part is part
            )
        final = self.hidden * (2 if self.norm is NormKind.LAYER else 1)
        inside = sum(
            layer.parameters(self.norm) - sum(linear.parameters for linear in layer.linears) for layer in self.layers
        )
        found["norms"] = final + inside
        return found

    def adapted(self, entries: Sequence[str], *, added_tokens: bool = False) -> AdaptedParts:
        """Return what LoRA adapts, as the trainer chooses it: what ``entries`` of `lora.targetModules` name, or without
        entries all linear layers and experts but no router, and with ``added_tokens`` both embeddings.

        Raises UserError where an entry names nothing, or is no regular expression.
        """
        fits = [_fits(entry) for entry in entries] or [_fits(ALL_LINEAR)]
        used = [False] * len(fits)
        chosen: list[tuple[Linear, ...]] = []
        for number, layer in enumerate(self.layers):
            kept = []
            for linear in layer.linears:
                hits = [fit(f"{self.prefix}.{number}.{linear.name}", linear.part) for fit in fits]
                used = [before or hit for before, hit in zip(used, hits, strict=True)]
                if any(hits):
                    kept.append(linear)
            chosen.append(tuple(kept))
        ends = [any(fit(name, None) for fit in fits) for name in ("model.embed_tokens", "lm_head")]
        used = [
            before or fit("model.embed_tokens", None) or fit("lm_head", None)
            for before, fit in zip(used, fits, strict=True)
        ]
        for entry, was_used in zip(entries, used, strict=False):
            if not was_used:
                raise UserError(FIELD, f"must name modules of the model, and {entry!r} is none")
        both = added_tokens and not entries
        return AdaptedParts(layers=tuple(chosen), embedding=ends[0] or both, head=ends[1] or both)


@dataclass(frozen=True, kw_only=True, slots=True)
class AdaptedParts:
    """The parts of a model that get a LoRA adapter."""

    layers: tuple[tuple[Linear, ...], ...]
    """The adapted linear layers of each layer of the model."""
    embedding: bool = False
    head: bool = False

    def parameters(self, sizes: ModelSizes, rank: int, *, added_rows: int = 0) -> int:
        """Return the number of parameters of adapters of rank ``rank``. The vocabulary of ``sizes`` grows by
        ``added_rows``."""
        inside = sum(linear.adapter_parameters(rank) for layer in self.layers for linear in layer)
        ends = self.embedding + self.head
        return inside + ends * rank * (sizes.vocabulary + added_rows + sizes.hidden)


def _fits(entry: str) -> Callable[[str, Part | None], bool]:
    """Return a function that says whether ``entry`` of `lora.targetModules` selects a module, by the module's full name
    and its part, which is None for embeddings and output head."""
    if entry == ALL_LINEAR:
        return lambda name, part: part is not None and part is not Part.ROUTER
    if is_pattern(entry):
        pattern = compile_entry(entry)
        return lambda name, part: part is not Part.ROUTER and pattern.fullmatch(name) is not None
    return lambda name, part: name == entry or name.endswith(f".{entry}")
