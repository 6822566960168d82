"""LoRA adapts the linear layers and experts that a text goes through, but no router that the job does not name, and no
part of the model that no text goes through."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from finetune_core.api.method import LoRASpec
from finetune_core.errors import UserError
from finetune_trainer.checkpoints.adapter_changes import adapter_changes
from finetune_trainer.model.adaptable import Part, TextPath, layers_read_past
from finetune_trainer.model.adapters import add_adapters, choose_targets, reach_notice, unquantized_notice
from finetune_trainer.model.load import load_base, trained_parameters
from finetune_trainer.model.structure import ModelStructure, read_structure
from finetune_trainer.pod.model_file_names import ADAPTER_FILE
from tests.trainer.families import FAMILIES, family_configuration, write_family

QUICK = [
    "bert",
    "deepseek-v3",
    "deepseek-v4",
    "gemma-3-vision",
    "gemma-3n",
    "gpt-2",
    "gpt-oss",
    "hunyuan-moe",
    "jetmoe",
    "llama-2",
    "llama-4",
    "mamba",
    "mixtral",
    "qwen2-moe",
    "qwen3-next",
]
UNTRAINABLE = {"deepseek-v2"}
"""Families whose tiny model can't compute with the eager attention of transformers."""
MIXTURES = ["deepseek-v3", "gpt-oss", "jetmoe", "llama-4", "mixtral", "qwen3-next"]
FAMILY_NAMES = [
    pytest.param(name, marks=() if name in QUICK else pytest.mark.long) for name in FAMILIES if name not in UNTRAINABLE
]
IDS = torch.randint(3, 60, (2, 24), generator=torch.Generator().manual_seed(1))


def family_model(name: str) -> PreTrainedModel:
    """Return the tiny model of a family with weights that let every layer change the logits."""
    torch.manual_seed(5)
    model = AutoModelForCausalLM.from_config(family_configuration(name, vocabulary=64), attn_implementation="eager")
    with torch.no_grad():
        for value in model.state_dict().values():
            if value.is_floating_point() and value.ndim >= 2:
                value.normal_(0, value.shape[-1] ** -0.5)
            elif value.is_floating_point():
                value.add_(torch.randn_like(value) * 0.1)
    model.config.use_cache = False
    return model.eval()


def structure_of(model: Any) -> ModelStructure:
    names = {id(module): name for name, module in model.named_modules(remove_duplicate=False)}
    head = model.get_output_embeddings()
    output = names[id(head)] if head is not None else None
    embedding = model.get_input_embeddings()
    rows = int(embedding.weight.shape[0])
    return ModelStructure(model, names[id(embedding)], output, tied=False, rows=rows, context=None)


def adapted_model(name: str, lora: LoRASpec, *, added_tokens: bool = False) -> tuple[PreTrainedModel, PeftModel]:
    """Return the base model of a family, and the same model with adapters of random values."""
    base = family_model(name)
    targets = choose_targets(structure_of(base), lora, added_tokens=added_tokens)
    tuned = add_adapters(
        copy.deepcopy(base), lora, targets=targets.modules, parameters=targets.parameters, seed=1, base_name="tiny"
    )
    with torch.no_grad():
        for key, value in trained_parameters(tuned).items():
            value.normal_(0, 0.1) if "magnitude" not in key else value.mul_(1 + 0.3 * torch.rand_like(value))
    return base, tuned.eval()


def logits_of(model: Any) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=IDS, use_cache=False).logits
    return logits


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_peft_adapts_exactly_the_chosen_weights_and_every_adapter_learns(name: str) -> None:
    base = family_model(name)
    structure = structure_of(base)
    targets = choose_targets(structure, LoRASpec(), added_tokens=False)
    weights = {weight.name: weight for weight in TextPath(structure).weights}
    assert {weights[chosen].part for chosen in targets.names} <= {Part.LAYER, Part.EXPERTS}
    wanted = {weights[chosen].parameter or chosen for chosen in targets.names}
    _, tuned = adapted_model(name, LoRASpec(rank=2))
    assert {*tuned.base_model.targeted_module_names, *tuned.base_model.targeted_parameter_names} == wanted
    for training in (False, True):
        tuned.zero_grad()
        logits = tuned.train(training)(input_ids=IDS, use_cache=False).logits
        logits.float().log_softmax(-1)[:, :, 5].sum().backward()
        trained = trained_parameters(tuned)
        assert not [key for key, value in trained.items() if value.grad is None or not value.grad.any()]


@pytest.mark.parametrize("name", ["gemma-3-vision", "llama-2", "gpt-2", "mixtral"])
def test_each_linear_layer_that_computes_a_text_is_chosen_and_no_other(name: str) -> None:
    model = family_model(name)
    structure = structure_of(model)
    seen: set[str] = set()

    def note(module: str) -> Any:
        return lambda *_: seen.add(module)

    for module_name, module in model.named_modules():
        module.register_forward_hook(note(module_name))
    logits_of(model)
    linear = {key for key, module in model.named_modules() if isinstance(module, nn.Linear) or "Conv1D" in str(module)}
    leaves = {key for key in linear & seen if not list(model.get_submodule(key).children())}
    chosen = choose_targets(structure, LoRASpec(), added_tokens=False)
    layers = {key for key in chosen.names if "experts" not in key}
    assert layers == leaves - {structure.output_name}


def test_the_share_of_the_weights_in_reach_is_that_of_all_layers() -> None:
    structure = structure_of(family_model("mixtral"))
    everything = choose_targets(structure, LoRASpec(), added_tokens=False)
    attention = choose_targets(structure, LoRASpec(target_modules=["q_proj", "v_proj"]), added_tokens=False)
    matrices = {
        key: value.numel()
        for key, value in structure.model.named_parameters()
        if "embed" not in key and "lm" not in key
    }
    norms_and_routers = sum(value for key, value in matrices.items() if "norm" in key or key.endswith("gate.weight"))
    total = sum(matrices.values())
    assert everything.share == pytest.approx(1 - norms_and_routers / total)
    assert attention.share == pytest.approx(
        sum(value for key, value in matrices.items() if re.search("[qv]_proj", key)) / total
    )
    assert reach_notice(attention) == (
        f"lora: the adapters reach {attention.share:.1%} of the weights in the model's layers (q_proj, v_proj)"
    )


@pytest.mark.parametrize(
    ("name", "entries", "wanted"),
    [
        ("mixtral", ["gate"], {"mlp.gate"}),
        ("mixtral", ["experts.down_proj", "q_proj"], {"mlp.experts.down_proj", "self_attn.q_proj"}),
        ("mixtral", ["down_proj"], {"mlp.experts.down_proj"}),
        ("mixtral", [r".*\.(mlp|self_attn)\..*"], {*(f"self_attn.{x}_proj" for x in "qkvo"), "mlp.experts.down_proj",
                                                   "mlp.experts.gate_up_proj"}),
        ("llama-4", ["router"], {"feed_forward.router"}),
        ("gemma-3-vision", ["q_proj"], {"self_attn.q_proj"}),
        ("llama-2", ["all-linear"], {f"self_attn.{x}_proj" for x in "qkvo"} | {f"mlp.{x}_proj" for x in
                                                                               ("gate", "up", "down")}),
    ],
)  # fmt: skip
def test_entries_of_target_modules_select_names_patterns_and_all_linear_layers(
    name: str, entries: list[str], wanted: set[str]
) -> None:
    targets = choose_targets(structure_of(family_model(name)), LoRASpec(target_modules=entries), added_tokens=True)
    assert {key.partition("layers.")[2].partition(".")[2] for key in targets.names} == wanted
    assert not any("vision" in key for key in targets.names)


@pytest.mark.parametrize(
    ("name", "router"),
    [
        ("mixtral", "gate"),
        ("hunyuan-moe", "gate.wg"),
        ("llama-4", "router"),
        ("gpt-oss", "router"),
        ("zaya", "fc1"),
        ("deepseek-v3", "gate"),
    ],
)
def test_a_router_that_is_named_learns(name: str, router: str) -> None:
    _, tuned = adapted_model(name, LoRASpec(target_modules=[router]))
    logits = tuned(input_ids=IDS, use_cache=False).logits
    logits.float().log_softmax(-1)[:, :, 5].sum().backward()
    trained = trained_parameters(tuned)
    assert trained
    assert all(value.grad is not None and value.grad.any() for value in trained.values())


def test_a_pattern_can_select_single_layers() -> None:
    lora = LoRASpec(target_modules=[r"model\.layers\.1\..*"])
    base, tuned = adapted_model("llama-2", lora)
    assert len(tuned.base_model.targeted_module_names) == 7
    assert all(key.startswith("model.layers.1.") for key in tuned.base_model.targeted_module_names)
    assert not torch.equal(logits_of(base), logits_of(tuned))


@pytest.mark.parametrize(
    ("name", "lora", "problem"),
    [
        ("llama-2", {"targetModules": ["q_prj"]}, "lora.targetModules: must name modules of the model, and 'q_prj' is"),
        (
            "llama-2",
            {"targetModules": ["x.*"]},
            "lora.targetModules: must name modules of the model, and 'x.*' is none",
        ),
        ("llama-2", {"targetModules": ["*_proj"]}, "lora.targetModules: must be a regular expression in the syntax of"),
        ("gemma-3-vision", {"targetModules": ["fc1"]}, "'fc1' is none, but only of parts that no text goes through"),
        ("jamba", {"targetModules": ["dt_proj"]}, "whose weight the model reads without calling the layer"),
        ("mamba", {"targetModules": ["out_proj"]}, "whose weight the model reads without calling the layer"),
        ("gemma-3n", {"targetModules": ["correction_coefs"]}, "whose weight the model reads without calling the layer"),
        ("opt", {"targetModules": ["embed_positions"]}, "which looks up other rows than those of its input"),
        ("mixtral", {"targetModules": ["weight"]}, "'weight' is none; it has down_proj"),
        ("mixtral", {"dropout": "0.1"}, "lora.dropout: must be 0 while model.layers.0.mlp.experts.gate_up_proj gets"),
        (
            "mixtral",
            {"quantization": "NF4"},
            "lora.quantization: must be absent for a model with experts: bitsandbytes",
        ),
        ("mixtral", {"doRA": True}, "lora.doRA: must be false while model.layers.0.mlp.experts.gate_up_proj gets"),
    ],
)
def test_what_fits_nothing_or_what_peft_can_not_do_is_a_sentence(name: str, lora: dict[str, Any], problem: str) -> None:
    structure = structure_of(family_model(name))
    with pytest.raises(UserError) as found:
        choose_targets(structure, LoRASpec.model_validate(lora), added_tokens=False)
    assert problem in str(found.value)


def test_a_quantized_base_model_holds_its_linear_layers_in_four_bits(tiny_model: Path) -> None:
    whole = load_base(tiny_model, torch.float32)
    quantized = load_base(tiny_model, torch.float32, quantization="NF4")
    targets = choose_targets(structure_of(whole), LoRASpec(), added_tokens=False)
    for name in targets.names:
        weight, held = whole.get_submodule(name).weight, quantized.get_submodule(name).weight
        assert held.numel() * held.element_size() * 8 == weight.numel() * 4, name
        near, weight = dequantize_4bit(held.data, held.quant_state), weight.detach()
        assert 0 < float((near - weight).abs().max()) < 0.3 * float(weight.abs().max()), name
    for embedding in (structure_of(whole).input_name, structure_of(whole).output_name):
        assert embedding is not None
        assert torch.equal(quantized.get_submodule(embedding).weight, whole.get_submodule(embedding).weight)


@pytest.mark.parametrize("name", ["gemma-3n", "mamba", "rwkv"])
def test_a_quantized_model_trains_where_its_code_reads_weights_itself(name: str, tmp_path: Path) -> None:
    """Code of a model that multiplies with a weight itself, or limits it, can't do so with 4-bit numbers. So the layers
    of such weights are not quantized."""
    folder = write_family(name, tmp_path)
    structure, whole = read_structure(folder), load_base(folder, torch.float32)
    lora = LoRASpec(rank=2, quantization="NF4")
    targets = choose_targets(structure, lora, added_tokens=False)
    tuned = add_adapters(
        load_base(folder, torch.float32, quantization="NF4"), lora, targets=targets.modules, seed=1, base_name="tiny"
    )
    for training in (True, False):
        assert tuned.train(training)(input_ids=IDS, use_cache=False).logits.isfinite().all()
    left_out = layers_read_past(structure.model)
    assert left_out
    (notice,) = unquantized_notice(structure)
    for layer in left_out:
        weight = tuned.get_base_model().get_submodule(layer).weight
        assert weight.shape == whole.get_submodule(layer).weight.shape
        assert layer.rpartition(".")[2] in notice
    quantized = [value for value in tuned.parameters() if value.dtype is torch.uint8]
    assert quantized


def test_a_layer_that_peft_adapts_as_a_parameter_is_not_quantized() -> None:
    """peft turns the name `gate_proj` into that of an expert weight, although no layer of this model has experts."""
    config = family_configuration("qwen3-moe", vocabulary=64)
    config.mlp_only_layers = [0, 1]
    structure = structure_of(AutoModelForCausalLM.from_config(config))
    with pytest.raises(UserError, match=r"^lora.quantization: must be absent while model.layers.0.mlp.gate_proj gets"):
        choose_targets(structure, LoRASpec(quantization="NF4"), added_tokens=False)
    attention = LoRASpec(quantization="NF4", target_modules=["q_proj", "o_proj"])
    assert len(choose_targets(structure, attention, added_tokens=False).names) == 4


@pytest.mark.parametrize("name", ["opt", "gemma-3", "gpt-2"])
def test_a_pattern_that_fits_everything_adapts_all_that_peft_can_adapt(name: str) -> None:
    base, tuned = adapted_model(name, LoRASpec(rank=2, target_modules=[".*"]))
    assert not torch.equal(logits_of(base), logits_of(tuned))
    weights = TextPath(structure_of(base)).weights
    assert len(tuned.base_model.targeted_module_names) == len([weight for weight in weights if not weight.problem])


def test_an_evaluation_does_not_change_a_quantized_base_model(tiny_model: Path) -> None:
    model = load_base(tiny_model, torch.float32, quantization="NF4").train()
    before = logits_of(model)
    after = logits_of(model.eval())
    assert torch.equal(after, before)
    assert torch.equal(logits_of(model.train()), before)


@pytest.mark.parametrize("name", [*MIXTURES, "gemma-3-vision", "gpt-2"])
def test_plain_peft_loads_the_adapter_with_the_same_logits(name: str, tmp_path: Path) -> None:
    base, tuned = adapted_model(name, LoRASpec(rank=2, alpha=4, rs_lora=True))
    tuned.peft_config["default"].save_pretrained(str(tmp_path))
    tensors = get_peft_model_state_dict(tuned, save_embedding_layers=False)
    save_file({key: value.contiguous() for key, value in tensors.items()}, tmp_path / ADAPTER_FILE)
    again = PeftModel.from_pretrained(base, tmp_path).eval()
    assert torch.equal(logits_of(again), logits_of(tuned))


@pytest.mark.parametrize(
    ("name", "lora"),
    [
        *((name, {}) for name in MIXTURES),
        ("qwen2-moe", {"rsLoRA": True}),
        ("llama-2", {"doRA": True, "rsLoRA": True}),
        ("gpt-2", {"doRA": True}),
        ("gpt-2", {}),
    ],
)
def test_the_changed_weights_compute_what_the_adapters_compute(name: str, lora: dict[str, Any]) -> None:
    added = name == "llama-2"
    base, tuned = adapted_model(name, LoRASpec.model_validate({"rank": 2, **lora}), added_tokens=added)
    changes = adapter_changes(tuned, {key: value.detach() for key, value in trained_parameters(tuned).items()})
    targets = choose_targets(structure_of(base), LoRASpec.model_validate({"rank": 2, **lora}), added_tokens=added)
    assert set(changes) == set(targets.weight_names)
    before, wanted = logits_of(base), logits_of(tuned)
    # The embedding and the output head each have a change of their own, so they must not share one weight.
    if added:
        base.lm_head.weight = nn.Parameter(base.lm_head.weight.detach().clone())
    with torch.no_grad():
        for key, change in changes.items():
            weight = base.get_parameter(key)
            weight.copy_(change.applied_to(weight))
    assert not torch.allclose(before, wanted, atol=1e-2)
    torch.testing.assert_close(logits_of(base), wanted, rtol=1e-4, atol=1e-4)
