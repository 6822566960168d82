"""Chooses the weights that get a LoRA adapter, and adds the adapters. `base_check.py` and `adapter_fit.py` call
`choose_targets`, also in the preflight check. `preparation.py` calls `add_adapters` on every rank.

The initial matrices of a new adapter depend only on the seed and on the name and shape of each parameter, and are drawn
in fp32 on the CPU. So they are the same at every ZeRO stage, on any number of ranks and on every device.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.tuners.lora import model as lora_model
from peft.tuners.lora.layer import ParamWrapper
from transformers import PreTrainedModel

from finetune_core.api.method import DEFAULT_ALPHA, DEFAULT_RANK, LoRASpec
from finetune_core.errors import UserError
from finetune_core.target_modules import ALL_LINEAR, compile_entry, is_pattern
from finetune_core.target_modules import FIELD as TARGETS
from finetune_trainer.model.adaptable import AdaptableWeight, Part, TextPath, layers_read_past, shortest_names
from finetune_trainer.model.structure import ModelStructure
from finetune_trainer.pod.errors import first_line


class GivenWeights(Protocol):
    """The adapters that a job continues."""

    def configuration(self, lora: LoRASpec) -> LoraConfig:
        """Return their configuration, with the dropout of ``lora``."""

    def weight(self, name: str) -> torch.Tensor:
        """Return the value of the parameter ``name`` of the model with adapters."""


MAGNITUDE = "lora_magnitude_vector"
"""Part of the names of DoRA's trained norms, one vector for each adapted weight."""


@dataclass(frozen=True)
class AdapterTargets:
    """The weights that get an adapter, and the settings of peft that select these weights."""

    names: list[str] = field(default_factory=list)
    """Full names of the adapted modules and expert weights, in the model's order, for example
    `model.layers.0.self_attn.q_proj` and `model.layers.0.mlp.experts.down_proj`."""
    modules: list[str] = field(default_factory=list)
    """`target_modules` of peft: short names such as `q_proj` where a short name selects only modules in `names`, else
    full names."""
    parameters: list[str] = field(default_factory=list)
    """`target_parameters` of peft, as full names."""
    weight_names: list[str] = field(default_factory=list)
    """Full names of the adapted weights, for example `model.layers.0.self_attn.q_proj.weight`."""
    adapted_elements: int = 0
    """Number of elements of the adapted weights."""
    elements: int = 0
    """Number of elements of all weights in the layers that a text goes through. Embeddings and output head count only
    where they are adapted."""

    @property
    def share(self) -> float:
        """Share of the weights in the model's layers that the adapters can change, from 0 to 1."""
        return self.adapted_elements / self.elements if self.elements else 0.0


def choose_targets(structure: ModelStructure, lora: LoRASpec, *, added_tokens: bool) -> AdapterTargets:
    """Return the weights that get an adapter.

    Only weights that a text goes through are chosen. Where `lora.targetModules` is empty, the result is all linear
    layers and experts that peft can adapt, and also both embeddings where the job adds tokens. A router gets an adapter
    only where an entry of `lora.targetModules` names the router.

    Raises UserError where an entry fits no weight, and where peft can't add the adapters that the job asks for.
    """
    path = TextPath(structure)
    linear = [weight for weight in path.weights if weight.part in (Part.LAYER, Part.EXPERTS) and not weight.problem]
    ends = (structure.input_name, structure.output_name)
    embeddings = [weight for weight in path.weights if weight.name in ends and not weight.problem]
    if lora.target_modules:
        chosen = [weight for entry in lora.target_modules for weight in _fitting(entry, path, linear)]
    else:
        chosen = [*linear, *(embeddings if added_tokens else ())]
    wanted = {weight.name for weight in chosen}
    weights = [weight for weight in path.weights if weight.name in wanted]
    if not weights:
        raise UserError("method", "must be Full: the model has no linear layer that peft can adapt")
    return targets_of(structure, path, weights, lora)


def targets_of(
    structure: ModelStructure, path: TextPath, weights: Sequence[AdaptableWeight], lora: LoRASpec
) -> AdapterTargets:
    """Return what peft must be told to adapt exactly ``weights``, which are in the order of ``path``. Raises UserError
    where peft can't add the adapters that ``lora`` asks for."""
    _check_supported(weights, lora)
    if lora.quantization is not None:
        _check_quantizable(path, weights)
    return AdapterTargets(
        names=[weight.name for weight in weights],
        modules=shortest_names(
            [weight.name for weight in weights if weight.parameter is None],
            [name for name, _ in structure.model.named_modules()],
        ),
        parameters=[weight.parameter for weight in weights if weight.parameter is not None],
        weight_names=[weight.parameter or f"{weight.name}.weight" for weight in weights],
        adapted_elements=sum(weight.elements for weight in weights),
        elements=path.elements + sum(weight.elements for weight in weights if weight.part is Part.EMBEDDING),
    )


def _fitting(entry: str, path: TextPath, linear: Sequence[AdaptableWeight]) -> list[AdaptableWeight]:
    """Return the weights that ``entry`` of `lora.targetModules` selects. ``linear`` holds the weights that the entry
    `all-linear` selects."""
    if entry == ALL_LINEAR:
        return list(linear)
    if is_pattern(entry):
        pattern = compile_entry(entry)
        # A regular expression that fits whole layers, such as `.*layers.0.*`, selects neither the routers in them nor
        # weights that peft can't adapt, unless it fits nothing else.
        named = [weight for weight in path.weights if pattern.fullmatch(weight.name)]
        found = [weight for weight in named if weight.part is not Part.ROUTER and not weight.problem] or named
        kind = "a regular expression for names of modules"
    else:
        found = [weight for weight in path.weights if weight.has_name(entry)]
        kind = "a name of modules"
    if not found:
        ends = sorted({weight.name.rpartition(".")[2] for weight in path.weights})
        beside = ", but only of parts that no text goes through" if path.is_beside(entry) else ""
        raise UserError(
            TARGETS, f"must name modules of the model, and {entry!r} is none{beside}; it has {', '.join(ends[:20])}"
        )
    for weight in found:
        if weight.problem:
            raise UserError(TARGETS, f"{entry!r} must not be {kind} such as {weight.name}, {weight.problem}")
    return found


def _check_supported(weights: Sequence[AdaptableWeight], lora: LoRASpec) -> None:
    """Raise UserError where ``lora`` asks for a kind of adapter that peft has only for whole modules, and one of
    ``weights`` is adapted as a parameter (`target_parameters`)."""
    parameter = next((weight for weight in weights if weight.parameter is not None), None)
    if parameter is None or lora.only_for_modules is None:
        return
    name, must = lora.only_for_modules
    raise UserError(
        f"lora.{name}",
        f"must be {must} while {parameter.name} gets an adapter, because peft supports nothing else for the"
        " layers of a mixture of experts; or lora.targetModules must name modules without it",
    )


def _check_quantizable(path: TextPath, weights: Sequence[AdaptableWeight]) -> None:
    """Raise UserError where the model has experts, which bitsandbytes does not quantize, and where one of the adapted
    ``weights`` is adapted as a parameter (`target_parameters`), which peft can't do with 4-bit numbers."""
    experts = next((weight for weight in path.weights if weight.part is Part.EXPERTS), None)
    if experts is not None:
        raise UserError(
            "lora.quantization",
            f"must be absent for a model with experts: bitsandbytes quantizes linear layers only, and {experts.name}"
            " would stay as it is",
        )
    parameter = next((weight for weight in weights if weight.parameter is not None), None)
    if parameter is not None:
        raise UserError(
            "lora.quantization",
            f"must be absent while {parameter.name} gets an adapter, because peft can't adapt its weight in 4 bits; or"
            " lora.targetModules must name modules without it",
        )


def unquantized_notice(structure: ModelStructure) -> list[str]:
    """Return a notice about the linear layers that a quantized base model holds unquantized because the code of the
    model reads their weights itself. The list is empty without such layers. The notice does not name the output
    head, which is never quantized."""
    ends = sorted({name.rpartition(".")[2] for name in layers_read_past(structure.model)})
    if not ends:
        return []
    return [
        f"lora.quantization: the linear layers {', '.join(ends)} stay as they are, because the code of the model reads"
        " their weights itself"
    ]


def reach_notice(targets: AdapterTargets) -> str:
    """Return the notice about which weights the adapters can change, for example `lora: the adapters reach 98.0% of
    the weights in the model's layers (down_proj, q_proj)`."""
    ends = sorted({name.rpartition(".")[2] for name in targets.names})
    kinds = ", ".join(ends[:12]) + (", …" if len(ends) > 12 else "")
    return f"lora: the adapters reach {targets.share:.1%} of the weights in the model's layers ({kinds})"


def adapts_an_embedding(structure: ModelStructure, targets: AdapterTargets) -> bool:
    """Return whether ``targets`` contain the input embedding or the output head."""
    return not {structure.input_name, structure.output_name}.isdisjoint(targets.names)


WRAPPED = ".base_layer"
"""What peft appends to a module's name for each wrapper that it puts around the module. A module has several wrappers
where peft adapts several of its parameters."""
PEFT_PREFIX = "base_model.model."
"""Prefix that peft puts before the names of all modules of the base model."""


def adapted_weight(name: str, module: LoraLayer) -> str:
    """Return the full name in the base model of the weight that ``module`` adapts, for example
    `model.layers.0.self_attn.q_proj.weight`. ``name`` is the name of the module in the model with adapters."""
    parameter = module.parameter_name if isinstance(module, ParamWrapper) else "weight"
    return f"{name.removeprefix(PEFT_PREFIX).replace(WRAPPED, '')}.{parameter}"


def new_adapters(lora: LoRASpec, targets: Sequence[str], parameters: Sequence[str]) -> LoraConfig:
    """Return the configuration of new adapters. ``targets`` and ``parameters`` are as peft's `target_modules` and
    `target_parameters`."""
    return LoraConfig(
        r=lora.rank or DEFAULT_RANK,
        lora_alpha=lora.alpha or DEFAULT_ALPHA,
        lora_dropout=float(lora.dropout),
        use_rslora=bool(lora.rs_lora),
        use_dora=bool(lora.do_ra),
        target_modules=list(targets),
        target_parameters=list(parameters) or None,
        task_type="CAUSAL_LM",
    )


def add_adapters(
    model: PreTrainedModel,
    lora: LoRASpec,
    *,
    targets: Sequence[str],
    parameters: Sequence[str] = (),
    seed: int,
    base_name: str,
    given: GivenWeights | None = None,
) -> PeftModel:
    """Add LoRA adapters to ``model``. ``targets`` is `target_modules` of peft, and ``parameters`` is
    `target_parameters`.

    ``base_name`` is the base model's name for `adapter_config.json`. ``given`` are the adapters that the job continues.
    With ``given``, configuration and weights are taken from there, and ``targets``, ``parameters`` and ``seed`` have no
    effect.
    """
    config = given.configuration(lora) if given is not None else new_adapters(lora, targets, parameters)
    parameters = config.target_parameters or ()
    try:
        with contextlib.nullcontext() if lora.quantization is not None else _without_bitsandbytes():
            tuned = get_peft_model(model, config, autocast_adapter_dtype=False)
    except ValueError as error:
        raise UserError(TARGETS, f"must name modules of the model: {first_line(error)}") from error
    # Replace peft's default, the local folder of the base model, which means nothing outside of this pod.
    tuned.peft_config["default"].base_model_name_or_path = base_name
    # peft may keep the names of the parameters in a set, whose order differs between processes.
    if parameters:
        tuned.peft_config["default"].target_parameters = sorted(parameters)
    for name, parameter in tuned.named_parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(model.dtype)
            if given is not None:
                parameter.data.copy_(given.weight(name))
            # DoRA's magnitudes begin as the norms of the base model's rows, which peft has computed.
            elif MAGNITUDE not in name:
                parameter.data.copy_(initial_adapter(name, parameter.shape, seed))
    return tuned


@contextlib.contextmanager
def _without_bitsandbytes() -> Iterator[None]:
    """Keep peft from importing bitsandbytes inside of the `with` block.

    peft imports bitsandbytes to ask whether a layer is quantized. The import takes time and memory in each process. The
    caller uses the block only where no layer is quantized.
    """
    known = lora_model.is_bnb_available, lora_model.is_bnb_4bit_available
    lora_model.is_bnb_available = lora_model.is_bnb_4bit_available = lambda: False
    try:
        yield
    finally:
        lora_model.is_bnb_available, lora_model.is_bnb_4bit_available = known


def initial_adapter(name: str, shape: torch.Size, seed: int) -> torch.Tensor:
    """Return the initial value of an adapter's weight in fp32. The product B @ A of an adapter is zero at first.

    For a dense layer B is zero, and A is uniform with bound 1 / sqrt(columns): Kaiming's rule with a = sqrt(5), as in
    peft and in the code of the LoRA paper (Hu et al., 2021). For an embedding A is zero and B is normally distributed,
    as in peft.
    """
    embedding = "lora_embedding_" in name
    if ("lora_embedding_A" in name) if embedding else ("lora_B" in name):
        return torch.zeros(shape)
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)
    if embedding:
        return torch.empty(shape).normal_(generator=generator)
    bound = 1 / math.sqrt(shape[-1])
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)
