"""Reads the sizes of a model out of its `config.json`.

`planned_job.py` calls `model_sizes`. Only the families in `FAMILIES` are known. Any other `model_type` raises
`UnknownModelError`, because a guess could be wrong by the size of the model. tests/planning/test_model_sizes.py
compares the counts with those of transformers for each known family.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from finetune_core.errors import UserError
from finetune_core.planning.model_sizes import LayerSizes, Linear, ModelSizes, NormKind, Part

CONFIGURATION = "config.json"
"""The file that describes a model, and the name of its fields in errors."""
LARGEST_NUMBER = 10_000_000
"""Largest number of a configuration that is taken for a size. The largest vocabularies have 262,208 tokens."""
MOST_LAYERS = 2_000
"""Largest number of layers. The largest published models have 126."""


class UnknownModelError(UserError):
    """The configuration is that of a family that the plan does not know."""


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
        found = f"{_shown(fields.family)} is none" if fields.family else "the file has none"
        raise UnknownModelError(
            f"{CONFIGURATION}: model_type",
            f"must be one that the plan knows, and {found}; known are {known}",
        )
    fields.defaults = family.defaults
    hidden, heads = fields.number("hidden_size"), fields.number("num_attention_heads")
    key_value = fields.number("num_key_value_heads", heads)
    width = fields.number("head_dim", hidden // heads)
    if width < 1:
        raise UserError(
            f"{CONFIGURATION}: num_attention_heads", f"must be at most hidden_size, {hidden}, without head_dim"
        )
    if heads % key_value:
        raise UserError(
            f"{CONFIGURATION}: num_attention_heads", f"must be a multiple of num_key_value_heads, {key_value}"
        )
    layers = tuple(
        _layer(fields, family, number, (hidden, heads * width, key_value * width, width))
        for number in range(fields.number("num_hidden_layers", most=MOST_LAYERS))
    )
    return ModelSizes(
        family=fields.family,
        vocabulary=fields.number("vocab_size"),
        hidden=hidden,
        heads=heads,
        key_value_heads=key_value,
        head_width=width,
        feed_forward=fields.number(family.expert_width if family.experts else "intermediate_size"),
        active_experts=_active_experts(fields, family) if family.experts else 0,
        shared_feed_forward=fields.number(family.shared_width, 0) if family.shared_width else 0,
        tied=fields.flag("tie_word_embeddings", default=family.tied),
        norm=family.norm,
        wide_norms=family.wide_norms,
        window=_window(fields, family),
        layers=layers,
        context=fields.number("max_position_embeddings", 0, most=1 << 40) or None,
    )


def _active_experts(fields: _Fields, family: Family) -> int:
    active, experts = fields.number("num_experts_per_tok"), fields.number(family.experts)
    if active > experts:
        raise UserError(
            f"{CONFIGURATION}: num_experts_per_tok",
            f"must be at most the number of experts, {experts}, and is {active}",
        )
    return active


def _shown(value: object) -> str:
    """Return ``value`` as text for an error, cut where it is long."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}…"


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
    if not isinstance(without, list):
        raise UserError(
            f"{CONFIGURATION}: mlp_only_layers", f"must be a list of numbers of layers, and is {_shown(without)}"
        )
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
        self.family = str(configuration.get("model_type") or "")
        self.defaults: Mapping[str, Any] = {}

    def number(self, name: str, default: int | None = None, *, most: int = LARGEST_NUMBER) -> int:
        """Return the field ``name``, a whole number from 1 to ``most``, or ``default`` where the field is absent or
        null. ``name`` may be several names with `|` between them."""
        name = next((one for one in name.split("|") if self.values.get(one) is not None), name.partition("|")[0])
        value = self.values.get(name, self.defaults.get(name))
        if value is None and default is not None:
            return default
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise UserError(f"{CONFIGURATION}: {name}", f"must be a whole number of at least 1, and is {_shown(value)}")
        if value > most:
            raise UserError(f"{CONFIGURATION}: {name}", f"must be at most {most:,}, and is {_shown(value)}")
        return value

    def flag(self, name: str, *, default: bool) -> bool:
        """Return the field ``name``, true or false, or ``default`` where the field is absent or null."""
        value = self.values.get(name, self.defaults.get(name))
        if value is None:
            return default
        if not isinstance(value, bool):
            raise UserError(f"{CONFIGURATION}: {name}", f"must be true or false, and is {_shown(value)}")
        return value

    def switch(self, source: bool | str) -> bool:
        """Return ``source``, or the value of the field that it names, which is false where it is absent."""
        return self.flag(source, default=False) if isinstance(source, str) else source
