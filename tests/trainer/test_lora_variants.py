"""LoRA's variants (rsLoRA, DoRA, LoRA+) and adapters of experts train as with plain peft, at every ZeRO stage, and
resume bit for bit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.optimizers import create_loraplus_optimizer
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from finetune_core.api.method import LoRASpec
from finetune_trainer.data.order import global_batch
from finetune_trainer.engine.engine import RATE_FACTOR, parameter_groups
from finetune_trainer.model.adapters import MAGNITUDE, add_adapters, initial_adapter
from finetune_trainer.model.load import load_base, trained_parameters
from finetune_trainer.pod.plan import Inputs
from tests.trainer import tiny
from tests.trainer.families import write_family
from tests.trainer.gangs import losses_of, train_all
from tests.trainer.objectstore import ObjectStore
from tests.trainer.plain_loop import DENSE, PlainExample, plain_losses
from tests.trainer.pods import run_config
from tests.trainer.test_recovery import artifact_files

STEPS, CUT = 6, 3
RATE = 1e-2
GLOBAL_BATCH = 6
RANK, ALPHA = 4, 8
LLAMA = "llama"


@dataclass(frozen=True)
class Variant:
    """A variant of LoRA: the settings of the job (``lora``), and the settings with which plain peft trains the same."""

    lora: Mapping[str, Any]
    peft: Mapping[str, Any] = field(default_factory=dict)
    ratio: float | None = None
    decay: float = 0.0
    family: str = LLAMA
    quantized: bool = False


EXPERTS = {
    "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
}
VARIANTS = {
    "rs": Variant({"rsLoRA": True}, {"use_rslora": True}),
    "dora": Variant({"doRA": True}, {"use_dora": True}),
    "plus": Variant({"loraPlusRatio": "16"}, ratio=16, decay=0.1),
    "three": Variant(
        {"rsLoRA": True, "doRA": True, "loraPlusRatio": "4"}, {"use_rslora": True, "use_dora": True}, ratio=4
    ),
    "nf4": Variant({"quantization": "NF4"}, quantized=True),
    "nf4-dora": Variant({"quantization": "NF4", "doRA": True}, {"use_dora": True}, quantized=True),
    "experts": Variant({}, EXPERTS, family="mixtral"),
    "shared": Variant(
        {"targetModules": ["all-linear"]},
        {
            "target_modules": [],
            "target_parameters": [
                *EXPERTS["target_parameters"],
                *(f"mlp.shared_expert.{name}.weight" for name in ("gate_proj", "up_proj", "down_proj")),
                *(f"self_attn.{name}.weight" for name in ("q_proj", "k_proj", "v_proj", "o_proj")),
                *(f"linear_attn.{name}.weight" for name in ("in_proj_ba", "in_proj_qkvz", "out_proj")),
            ],
        },
        family="qwen3-next",
    ),
    "head": Variant({"targetModules": ["lm_head"]}, {"target_modules": ["lm_head"]}),
    "dora-embedding": Variant(
        {"doRA": True, "targetModules": ["embed_tokens", "q_proj"]},
        {"use_dora": True, "target_modules": ["embed_tokens", "q_proj"]},
    ),
}
Cases = list[tuple[str, int]]
"""Names of variants, each with the ZeRO stage at which it is trained."""
FEW = [("rs", 2), ("dora", 3), ("plus", 2), ("three", 1), ("nf4-dora", 2), ("experts", 3), ("shared", 0)]
"""Seven of the variants once each, and every ZeRO stage. The lists below have the other variants."""
FURTHER = [("dora", 0), ("plus", 0), ("plus", 3), ("nf4", 1), ("nf4", 2), ("experts", 2), ("shared", 3)]
ROUNDED = [("three", 3), ("nf4", 2), ("experts", 2)]
ROUNDED_FURTHER = [("plus", 1), ("experts", 3)]
RESUMED = [("three", 3), ("nf4", 2)]
RESUMED_FURTHER = [("plus", 2), ("experts", 3)]
WITHOUT_GRADIENTS_AT_THE_INPUT = [("shared", 3), ("head", 3)]
"""Runs in which ZeRO-3 gathers each trained module as a whole. In each run, the input of some trained module does not
depend on a trained weight."""
WITHOUT_GRADIENTS_FURTHER = [("dora", 3), ("dora-embedding", 3)]
ROWS = tiny.rows(20, seed=1)


def plain_peft(variant: Variant, folder: Path) -> list[float]:
    """Return the losses of a training with plain peft, with the initial values of the trainer's adapters."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, quantization_config=quantization if variant.quantized else None
    )
    config = LoraConfig(
        task_type="CAUSAL_LM", r=RANK, lora_alpha=ALPHA, **({"target_modules": DENSE} | dict(variant.peft))
    )
    # In training mode bitsandbytes does not round the scales of a quantized model.
    tuned = get_peft_model(model, config).train()
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if parameter.requires_grad and MAGNITUDE not in name:
                parameter.copy_(initial_adapter(name, parameter.shape, 42))
    if variant.ratio is None:
        trained = [parameter for parameter in tuned.parameters() if parameter.requires_grad]
        optimizer: torch.optim.Optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=variant.decay)
    else:
        optimizer = create_loraplus_optimizer(
            tuned,
            torch.optim.AdamW,
            lr=RATE,
            loraplus_lr_ratio=variant.ratio,
            loraplus_weight_decay=variant.decay,
        )
    examples = []
    for row in ROWS:
        prompt = tokenizer(tiny.TEMPLATE.replace("{prompt}", row["question"]))["input_ids"]
        answer = [*tokenizer(row["reply"])["input_ids"], tokenizer.eos_token_id]
        examples.append(PlainExample([*prompt, *answer], [False] * len(prompt) + [True] * len(answer)))
    batches = [
        global_batch(step, rows=len(ROWS), global_batch_size=GLOBAL_BATCH, seed=42) for step in range(1, STEPS + 1)
    ]
    return plain_losses(tuned, optimizer, examples, batches)


@pytest.fixture(scope="module")
def models(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The folders of the base models by family."""
    folder = tmp_path_factory.mktemp("families")
    families = {variant.family for variant in VARIANTS.values()} - {LLAMA}
    return {LLAMA: tiny_model} | {name: write_family(name, folder / name) for name in sorted(families)}


def config_of(store: ObjectStore, name: str, stage: int, kind: str, **changes: Any) -> dict[str, Any]:
    variant = VARIANTS[name]
    changes = {"optimization__gradientCheckpointing": stage == 3} | changes
    return run_config(
        store,
        f"{kind}-{name}-{stage}",
        world__nodes=2,
        lora={"rank": RANK, "alpha": ALPHA, **variant.lora},
        optimization__zeroStage=stage,
        optimization__maxSteps=STEPS,
        optimization__learningRate=RATE,
        optimization__weightDecay=variant.decay,
        optimization__globalBatchSize=GLOBAL_BATCH,
        optimization__microBatchSize=1 if stage == 3 else 3,
        storage__checkpointEverySteps=100,
        dataset__validation=None,
        **changes,
    )


def train(
    cases: list[tuple[str, int, str]],
    store: ObjectStore,
    models: dict[str, Path],
    folder: Path,
    faults: list[dict[str, Any] | None] | None = None,
    **changes: Any,
) -> None:
    folder.mkdir(exist_ok=True)
    rows = tiny.write_jsonl(folder / "train.jsonl", ROWS)
    configs = [config_of(store, name, stage, kind, **changes) for name, stage, kind in cases]
    inputs = [Inputs(model=models[VARIANTS[name].family], train=rows) for name, _, _ in cases]
    train_all(configs, inputs, folder / "gang", credentials=store.credentials, faults=faults)


def few_and_further(few: Cases, further: Cases) -> pytest.MarkDecorator:
    """Run a test with the cases ``few`` in `make gang` and `make test`, and with the cases ``further`` in `make
    test-long`."""
    return pytest.mark.parametrize(
        "cases", [pytest.param(few, id="few"), pytest.param(further, id="further", marks=pytest.mark.long)]
    )


@pytest.mark.gang
@few_and_further(FEW, [*FEW, *FURTHER])
def test_variants_and_experts_train_as_with_plain_peft(
    cases: Cases, store: ObjectStore, models: dict[str, Path], tmp_path: Path
) -> None:
    torch.set_num_threads(1)
    train([(name, stage, "exact") for name, stage in cases], store, models, tmp_path)
    plain = {name: plain_peft(VARIANTS[name], models[VARIANTS[name].family]) for name in dict(cases)}
    for name, stage in cases:
        found = losses_of(store, f"exact-{name}-{stage}")
        assert found == pytest.approx(plain[name], rel=1e-5), (name, stage)
    assert len({round(losses[-1], 4) for losses in plain.values()}) == len(plain), "each variant trains differently"


@pytest.mark.gang
@few_and_further(WITHOUT_GRADIENTS_AT_THE_INPUT, WITHOUT_GRADIENTS_FURTHER)
def test_trained_modules_whose_input_has_no_gradient_train_as_with_plain_peft(
    cases: Cases, store: ObjectStore, models: dict[str, Path], tmp_path: Path
) -> None:
    """Gradient checkpointing makes the output of the embedding require a gradient. Without gradient checkpointing, the
    input of the first trained module has no gradient."""
    torch.set_num_threads(1)
    runs = [(name, stage, "direct") for name, stage in cases]
    train(runs, store, models, tmp_path, optimization__gradientCheckpointing=False)
    for name, stage in cases:
        plain = plain_peft(VARIANTS[name], models[VARIANTS[name].family])
        assert losses_of(store, f"direct-{name}-{stage}") == pytest.approx(plain, rel=1e-5), (name, stage)


def test_each_parameter_has_the_learning_rate_that_peft_gives_it_in_lora_plus(tiny_model: Path) -> None:
    lora = LoRASpec.model_validate({"rank": RANK, "doRA": True, "loraPlusRatio": "16"})
    base = load_base(tiny_model, torch.float32)
    tuned = add_adapters(base, lora, targets=[*DENSE, "embed_tokens", "lm_head"], seed=1, base_name="tiny")
    names = {parameter: name for name, parameter in tuned.named_parameters()}
    optimizer = create_loraplus_optimizer(
        tuned, torch.optim.AdamW, lr=RATE, loraplus_lr_ratio=16, loraplus_lr_embedding=RATE
    )
    wanted = {names[value]: group["lr"] for group in optimizer.param_groups for value in group["params"]}
    groups = parameter_groups(tuned, 0.1, lora_plus_ratio=16)
    found = {names[value]: RATE * group.get(RATE_FACTOR, 1) for group in groups for value in group["params"]}
    assert found == wanted
    assert set(found) == set(trained_parameters(tuned))
    assert set(found.values()) == {RATE, RATE * 16}


@pytest.mark.gang
@few_and_further(ROUNDED, ROUNDED_FURTHER)
def test_variants_and_experts_train_in_bf16_and_with_packing_too(
    cases: Cases, store: ObjectStore, models: dict[str, Path], tmp_path: Path
) -> None:
    runs = [(name, stage, "bf16") for name, stage in cases]
    train(runs, store, models, tmp_path, optimization__precision="bf16", dataset__packing=True)
    for name, stage in cases:
        plain = plain_peft(VARIANTS[name], models[VARIANTS[name].family])
        assert losses_of(store, f"bf16-{name}-{stage}") == pytest.approx(plain, rel=1e-2), (name, stage)


@pytest.mark.gang
@few_and_further(RESUMED, RESUMED_FURTHER)
def test_a_resumed_training_with_variants_is_the_same_bits(
    cases: Cases, store: ObjectStore, models: dict[str, Path], tmp_path: Path
) -> None:
    runs = [(name, stage, kind) for name, stage in cases for kind in ("whole", "cut")]
    faults: list[dict[str, Any] | None] = [None, {"kind": "stop", "step": CUT + 1}]
    train(runs, store, models, tmp_path, faults * len(cases))
    train([run for run in runs if run[2] == "cut"], store, models, tmp_path / "again")
    for name, stage in cases:
        assert losses_of(store, f"cut-{name}-{stage}") == losses_of(store, f"whole-{name}-{stage}")
        assert artifact_files(store, f"cut-{name}-{stage}") == artifact_files(store, f"whole-{name}-{stage}")
