"""Reads the sizes of a model out of its `config.json`: which linear layers, embeddings and norms the model has, and so
how many parameters of each kind.

`memory.py`, `activations.py` and `speed.py` compute with the sizes. Only the families in `FAMILIES` are known. Any
other `model_type` raises `UnknownModelError`, because a guess could be wrong by the size of the model.
tests/planning/test_model_sizes.py compares the counts with those of transformers for each known family.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from finetune_core.errors import UserError
from finetune_core.target_modules import ALL_LINEAR, FIELD, compile_entry, is_pattern

CONFIGURATION = "config.json"
"""The file that describes a model, and the name of its fields in errors."""


class UnknownModelError(UserError):
    """The configuration is that of a family that the plan does not know."""


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
    def parameters(self) -> int:
        """Number of parameters, over all experts."""
        return self.experts * (self.inputs * self.outputs + self.biased * self.outputs)

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


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSizes:
    """The sizes of a causal language model."""

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

    @property
    def parameters(self) -> int:
        """Number of all parameters."""
        return sum(self.parameters_by_kind().values())

    @property
    def matrix_parameters(self) -> int:
        """Number of parameters that every token is multiplied with: those of the layers, without experts that do not
        compute the token, and those of the output head."""
        total = self.vocabulary * self.hidden
        for layer in self.layers:
            for linear in layer.linears:
                share = self.active_experts / linear.experts if linear.experts > 1 else 1.0
                total += int(linear.parameters * share)
        return total

    @property
    def largest_tensor(self) -> int:
        """Number of parameters of the largest tensor. transformers holds the weights of all experts of a layer in one
        tensor."""
        return max(
            self.vocabulary * self.hidden,
            *(linear.experts * linear.inputs * linear.outputs for layer in self.layers for linear in layer.linears),
        )

    def parameters_by_kind(self) -> dict[str, int]:
        """Return the number of parameters of each kind: embedding, head, norms, and the parts of the layers."""
        found = {"embedding": self.embedding_parameters, "head": self.head_parameters}
        for part in Part:
            found[part.value] = sum(
                linear.parameters for layer in self.layers for linear in layer.linears if linear.part is part
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


# ---- The families ----


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """How the models of a `model_type` are built, as far as their sizes depend on it."""

    norm: NormKind = NormKind.RMS
    norms: int = 2
    """Number of norms of a layer over the hidden states."""
    query_bias: bool | str = False
    """Whether queries, keys and values have a bias, or the field of the configuration that says so."""
    output_bias: bool | str = False
    """The same for the layer behind the attention."""
    feed_forward_bias: bool | str = False
    """The same for the feed-forward network."""
    head_norms: str = ""
    """`head`: queries and keys are normalised by head; `all`: over all heads together."""
    gated: bool = True
    """Whether the feed-forward network has a gate (SwiGLU, Shazeer 2020)."""
    fused: bool = False
    """Whether queries, keys and values are one linear layer, and gate and input another one."""
    tied: bool = False
    """Whether input embedding and head share a weight where the configuration does not say so."""
    wide_norms: bool = False
    """As in `ModelSizes`."""
    window: str = ""
    """The field with the sliding window. Empty: the family has none."""
    window_switch: str = ""
    """The field that switches the sliding window on. Empty: it is always on."""
    experts: str = ""
    """The field with the number of experts, or two such fields with `|` between them: the first that is there counts.
    Empty: the family has none."""
    expert_width: str = "intermediate_size"
    """The field with the width of an expert."""
    shared_width: str = ""
    """The field with the width of the expert that computes every token."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """Values of fields that the configuration may leave out."""


FAMILIES: Mapping[str, Family] = {
    "llama": Family(query_bias="attention_bias", output_bias="attention_bias", feed_forward_bias="mlp_bias"),
    "mistral": Family(window="sliding_window"),
    "ministral": Family(window="sliding_window"),
    "qwen2": Family(query_bias=True, window="sliding_window", window_switch="use_sliding_window"),
    "qwen3": Family(
        query_bias="attention_bias",
        output_bias="attention_bias",
        head_norms="head",
        window="sliding_window",
        window_switch="use_sliding_window",
    ),
    "gemma": Family(query_bias="attention_bias", output_bias="attention_bias", tied=True, wide_norms=True),
    "gemma3_text": Family(
        norms=4,
        head_norms="head",
        query_bias="attention_bias",
        output_bias="attention_bias",
        tied=True,
        wide_norms=True,
        window="sliding_window",
    ),
    "phi3": Family(fused=True, window="sliding_window"),
    "granite": Family(query_bias="attention_bias", output_bias="attention_bias", feed_forward_bias="mlp_bias"),
    "smollm3": Family(
        query_bias="attention_bias", output_bias="attention_bias", feed_forward_bias="mlp_bias", tied=True
    ),
    "olmo2": Family(query_bias="attention_bias", output_bias="attention_bias", head_norms="all"),
    "starcoder2": Family(
        norm=NormKind.LAYER,
        gated=False,
        query_bias="use_bias",
        output_bias="use_bias",
        feed_forward_bias="use_bias",
        tied=True,
        defaults={"use_bias": True},
    ),
    "mixtral": Family(experts="num_local_experts|num_experts"),
    "qwen2_moe": Family(
        query_bias="qkv_bias",
        experts="num_experts|num_local_experts",
        expert_width="moe_intermediate_size",
        shared_width="shared_expert_intermediate_size",
        defaults={"qkv_bias": True},
    ),
    "qwen3_moe": Family(
        query_bias="attention_bias",
        output_bias="attention_bias",
        head_norms="head",
        experts="num_experts|num_local_experts",
        expert_width="moe_intermediate_size",
    ),
    "olmoe": Family(
        query_bias="attention_bias",
        output_bias="attention_bias",
        head_norms="all",
        experts="num_experts|num_local_experts",
    ),
}
"""The families that the plan knows, by `model_type`. The sources are the classes of transformers 5 with these types."""


def model_sizes(configuration: Mapping[str, Any]) -> ModelSizes:
    """Return the sizes of the model that ``configuration``, the content of `config.json`, describes.

    Raises UnknownModelError for a family that is not in `FAMILIES`, and UserError where a needed field is missing or is
    no positive number.
    """
    fields = _Fields(configuration)
    family = FAMILIES.get(fields.family)
    if family is None:
        known = ", ".join(sorted(FAMILIES))
        raise UnknownModelError(
            f"{CONFIGURATION}: model_type",
            f"must be one that the plan knows, and {fields.family!r} is none; known are {known}",
        )
    fields.defaults = family.defaults
    hidden, heads = fields.number("hidden_size"), fields.number("num_attention_heads")
    key_value = fields.number("num_key_value_heads", heads)
    width = fields.number("head_dim", hidden // heads)
    if heads % key_value:
        raise UserError(
            f"{CONFIGURATION}: num_attention_heads", f"must be a multiple of num_key_value_heads, {key_value}"
        )
    layers = tuple(
        _layer(fields, family, number, (hidden, heads * width, key_value * width, width))
        for number in range(fields.number("num_hidden_layers"))
    )
    return ModelSizes(
        family=fields.family,
        vocabulary=fields.number("vocab_size"),
        hidden=hidden,
        heads=heads,
        key_value_heads=key_value,
        head_width=width,
        feed_forward=fields.number(family.expert_width if family.experts else "intermediate_size"),
        active_experts=fields.number("num_experts_per_tok") if family.experts else 0,
        shared_feed_forward=fields.number(family.shared_width, 0) if family.shared_width else 0,
        tied=fields.flag("tie_word_embeddings", default=family.tied),
        norm=family.norm,
        wide_norms=family.wide_norms,
        window=_window(fields, family),
        layers=layers,
        context=fields.number("max_position_embeddings", 0) or None,
    )


def _window(fields: _Fields, family: Family) -> int | None:
    if not family.window or (family.window_switch and not fields.flag(family.window_switch, default=False)):
        return None
    return fields.number(family.window, 0) or None


def _layer(fields: _Fields, family: Family, number: int, widths: tuple[int, int, int, int]) -> LayerSizes:
    hidden, queries, keys, head = widths
    query_bias, output_bias = fields.switch(family.query_bias), fields.switch(family.output_bias)

    def attention(name: str, inputs: int, outputs: int, biased: bool) -> Linear:
        return Linear(name=f"self_attn.{name}", inputs=inputs, outputs=outputs, biased=biased, part=Part.ATTENTION)

    linears = [
        *(
            [attention("qkv_proj", hidden, queries + 2 * keys, query_bias)]
            if family.fused
            else [
                attention("q_proj", hidden, queries, query_bias),
                attention("k_proj", hidden, keys, query_bias),
                attention("v_proj", hidden, keys, query_bias),
            ]
        ),
        attention("o_proj", queries, hidden, output_bias),
    ]
    if family.experts and _has_experts(fields, number):
        linears += _experts(fields, family, hidden)
    else:
        linears += _dense(fields, family, hidden)
    head_norms = {"": (), "head": (head, head), "all": (queries, keys)}[family.head_norms]
    return LayerSizes(linears=tuple(linears), norm_widths=(hidden,) * family.norms, head_norm_widths=head_norms)


def _has_experts(fields: _Fields, number: int) -> bool:
    """Return whether layer ``number`` has experts. The models of Qwen name layers without experts, or every how many
    layers have them."""
    without = fields.values.get("mlp_only_layers") or []
    return number not in without and (number + 1) % fields.number("decoder_sparse_step", 1) == 0


def _dense(fields: _Fields, family: Family, hidden: int) -> list[Linear]:
    width, biased = fields.number("intermediate_size"), fields.switch(family.feed_forward_bias)

    def linear(name: str, inputs: int, outputs: int) -> Linear:
        return Linear(name=f"mlp.{name}", inputs=inputs, outputs=outputs, biased=biased, part=Part.FEED_FORWARD)

    if not family.gated:
        return [linear("c_fc", hidden, width), linear("c_proj", width, hidden)]
    if family.fused:
        return [linear("gate_up_proj", hidden, 2 * width), linear("down_proj", width, hidden)]
    return [
        linear("gate_proj", hidden, width),
        linear("up_proj", hidden, width),
        linear("down_proj", width, hidden),
    ]


def _experts(fields: _Fields, family: Family, hidden: int) -> list[Linear]:
    count, width = fields.number(family.experts), fields.number(family.expert_width)
    shared = fields.number(family.shared_width, 0) if family.shared_width else 0

    def expert(name: str, inputs: int, outputs: int) -> Linear:
        return Linear(name=f"mlp.experts.{name}", inputs=inputs, outputs=outputs, experts=count, part=Part.EXPERTS)

    def always(name: str, inputs: int, outputs: int, part: Part = Part.FEED_FORWARD) -> Linear:
        return Linear(name=f"mlp.{name}", inputs=inputs, outputs=outputs, part=part)

    linears = [
        always("gate", hidden, count, Part.ROUTER),
        expert("gate_up_proj", hidden, 2 * width),
        expert("down_proj", width, hidden),
    ]
    if shared:
        linears += [
            always("shared_expert.gate_proj", hidden, shared),
            always("shared_expert.up_proj", hidden, shared),
            always("shared_expert.down_proj", shared, hidden),
            always("shared_expert_gate", hidden, 1),
        ]
    return linears


class _Fields:
    """The fields of a configuration that describe the text model."""

    def __init__(self, configuration: Mapping[str, Any]) -> None:
        # A model that also reads images keeps the sizes of its text part in a configuration of its own. Its other parts
        # take memory too, and are not known here.
        if not isinstance(configuration, Mapping):
            raise UserError(CONFIGURATION, "must be a JSON object")
        self.values = configuration
        self.family = str(configuration.get("model_type", ""))
        self.defaults: Mapping[str, Any] = {}

    def number(self, name: str, default: int | None = None) -> int:
        """Return the field ``name``, a positive whole number, or ``default`` where the field is absent or null.
        ``name`` may be several names with `|` between them."""
        name = next((one for one in name.split("|") if self.values.get(one) is not None), name.partition("|")[0])
        value = self.values.get(name, self.defaults.get(name))
        if value is None and default is not None:
            return default
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise UserError(f"{CONFIGURATION}: {name}", f"must be a whole number of at least 1, and is {value!r}")
        return value

    def flag(self, name: str, *, default: bool) -> bool:
        """Return the field ``name``, true or false, or ``default`` where the field is absent or null."""
        value = self.values.get(name, self.defaults.get(name))
        if value is None:
            return default
        if not isinstance(value, bool):
            raise UserError(f"{CONFIGURATION}: {name}", f"must be true or false, and is {value!r}")
        return value

    def switch(self, source: bool | str) -> bool:
        """Return ``source``, or the value of the field that it names, which is false where it is absent."""
        return self.flag(source, default=False) if isinstance(source, str) else source
