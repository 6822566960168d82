"""A job that starts from an adapter (`model.adapter`) trains as plain peft does: a job that continues the adapter
trains like a model of `PeftModel.from_pretrained`, and a job that merges it like a model of `merge_and_unload`. The
artifact names the adapter that it grew from.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from finetune_core.contract import Outcome, RunConfig
from finetune_core.layout import Manifest
from finetune_trainer.data.order import global_batch
from finetune_trainer.model.adapters import initial_adapter
from finetune_trainer.model.given_adapter import GivenAdapter
from finetune_trainer.pod.plan import Inputs
from finetune_trainer.sources.inputs import fetch_inputs
from finetune_trainer.storage.root import open_root
from tests.trainer import tiny
from tests.trainer.exporting import load_whole, same_logits
from tests.trainer.gangs import losses_of, train_all
from tests.trainer.given_adapters import write_adapter
from tests.trainer.objectstore import BUCKET, ObjectStore
from tests.trainer.plain_loop import DENSE, PlainExample, plain_losses
from tests.trainer.pods import run_config
from tests.trainer.preflights import paths_in
from tests.trainer.test_adapter_sources import write_object
from tests.trainer.test_recovery import artifact_files

pytestmark = pytest.mark.gang

STEPS, CUT, RATE, GLOBAL_BATCH = 6, 3, 1e-2, 6
ROWS = tiny.rows(20, seed=1)
SOURCE = {"volume": {"claimName": "claim", "path": "adapter"}}

CASES: dict[str, tuple[str, str, int, dict[str, Any]]] = {
    "continue-2": ("Continue", "LoRA", 2, {}),
    "continue-3": ("Continue", "LoRA", 3, {}),
    "continue-cut": ("Continue", "LoRA", 2, {}),
    "merge-lora-2": ("Merge", "LoRA", 2, {}),
    "merge-lora-3": ("Merge", "LoRA", 3, {"storage__artifact": "Merged"}),
    "merge-full-2": ("Merge", "Full", 2, {}),
    "merge-full-3": ("Merge", "Full", 3, {}),
    "merge-cut": ("Merge", "LoRA", 2, {}),
}
"""By name: what is done with the adapter, the method, the ZeRO stage, and other fields of the run file."""
VARIANTS = {"rs": {"use_rslora": True}, "dora": {"use_dora": True}}
NF4 = BitsAndBytesConfig(
    load_in_4bit=True,
    bnb_4bit_quant_type="nf4",
    bnb_4bit_use_double_quant=True,
    bnb_4bit_compute_dtype=torch.float32,
)


def config_of(store: ObjectStore, name: str, use: str, method: str, stage: int, **changes: Any) -> dict[str, Any]:
    changes = {"lora": {} if use == "Continue" else {"rank": 4, "alpha": 8}} | changes
    return run_config(
        store,
        f"adapter-{name}",
        world__nodes=2,
        method=method,
        model__adapter={**SOURCE, "use": use},
        optimization__zeroStage=stage,
        optimization__maxSteps=STEPS,
        optimization__learningRate=RATE,
        optimization__globalBatchSize=GLOBAL_BATCH,
        optimization__microBatchSize=3,
        storage__checkpointEverySteps=100,
        dataset__validation=None,
        **changes,
    )


def plain_examples(folder: Path) -> list[PlainExample]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    examples = []
    for row in ROWS:
        prompt = tokenizer(tiny.TEMPLATE.replace("{prompt}", row["question"]))["input_ids"]
        answer = [*tokenizer(row["reply"])["input_ids"], tokenizer.eos_token_id]
        examples.append(PlainExample([*prompt, *answer], [False] * len(prompt) + [True] * len(answer)))
    return examples


def plain_training(
    base: Path, adapter: Path, use: str, method: str, *, quantized: bool = False
) -> tuple[list[float], Any]:
    """Return the losses of a plain training in one process, and the trained model."""
    bare = load_whole(base)
    if quantized:
        bare = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, quantization_config=NF4)
    model: Any = PeftModel.from_pretrained(bare, adapter, is_trainable=use == "Continue")
    if use == "Merge":
        model = model.merge_and_unload()
        model.requires_grad_(method == "Full")
    if use == "Merge" and method == "LoRA":
        config = LoraConfig(r=4, lora_alpha=8, target_modules=DENSE, task_type="CAUSAL_LM")
        model = get_peft_model(model, config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.requires_grad:
                    parameter.copy_(initial_adapter(name, parameter.shape, 42))
    trained = [parameter for parameter in model.train().parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=0)
    batches = [
        global_batch(step, rows=len(ROWS), global_batch_size=GLOBAL_BATCH, seed=42) for step in range(1, STEPS + 1)
    ]
    return plain_losses(model, optimizer, plain_examples(base), batches), model.eval()


@pytest.fixture(scope="module")
def adapter(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_adapter(tiny_model, tmp_path_factory.mktemp("adapter") / "adapter")


@pytest.fixture(scope="module")
def trained(
    store: ObjectStore, tiny_model: Path, adapter: Path, tmp_path_factory: pytest.TempPathFactory
) -> ObjectStore:
    """The store after all of `CASES` were trained. The cases whose names end with `-cut` were interrupted and
    resumed."""
    folder = tmp_path_factory.mktemp("started")
    rows = tiny.write_jsonl(folder / "train.jsonl", ROWS)
    inputs = Inputs(model=tiny_model, adapter=adapter, train=rows)
    configs = {
        name: config_of(store, name, use, method, stage, **changes)
        for name, (use, method, stage, changes) in CASES.items()
    }
    faults = [{"kind": "stop", "step": CUT + 1} if name.endswith("cut") else None for name in CASES]
    train_all(list(configs.values()), inputs, folder / "gang", credentials=store.credentials, faults=faults)
    cut = [config for name, config in configs.items() if name.endswith("cut")]
    train_all(cut, inputs, folder / "again", credentials=store.credentials)
    return store


def artifact_folder(store: ObjectStore, name: str, folder: Path) -> Path:
    """Download the artifact of the case ``name`` to ``folder``, and return ``folder``."""
    base = f"runs/default/adapter-{name}/uid-1"
    inside = json.loads(store.read(f"{base}/ARTIFACT"))["folder"]
    return download(store, f"{base}/{inside}/", folder)


def download(store: ObjectStore, prefix: str, folder: Path) -> Path:
    for key in store.keys(prefix):
        path = folder / key.removeprefix(prefix)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(store.read(key))
    return folder


@pytest.mark.parametrize("name", [name for name in CASES if not name.endswith("cut")])
def test_every_loss_is_that_of_plain_peft(name: str, trained: ObjectStore, tiny_model: Path, adapter: Path) -> None:
    use, method, _, _ = CASES[name]
    losses, _ = plain_training(tiny_model, adapter, use, method)
    assert losses_of(trained, f"adapter-{name}") == pytest.approx(losses, rel=1e-5)


@pytest.mark.parametrize(("cut", "whole"), [("continue-cut", "continue-2"), ("merge-cut", "merge-lora-2")])
def test_a_resumed_training_is_the_same_bits(cut: str, whole: str, trained: ObjectStore) -> None:
    assert losses_of(trained, f"adapter-{cut}") == losses_of(trained, f"adapter-{whole}")
    assert artifact_files(trained, f"adapter-{cut}") == artifact_files(trained, f"adapter-{whole}")


def test_a_continued_adapter_is_exported_for_the_same_base_model(
    trained: ObjectStore, tiny_model: Path, adapter: Path, tmp_path: Path
) -> None:
    exported = artifact_folder(trained, "continue-2", tmp_path / "artifact")
    _, plain = plain_training(tiny_model, adapter, "Continue", "LoRA")
    again = PeftModel.from_pretrained(load_whole(tiny_model), exported).eval()
    assert same_logits(again, plain) < 1e-4
    config = json.loads((exported / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (4, 8)


def test_the_adapter_of_a_merged_base_names_the_merged_base_which_the_job_publishes(
    trained: ObjectStore, tiny_model: Path, adapter: Path, tmp_path: Path
) -> None:
    exported = artifact_folder(trained, "merge-lora-2", tmp_path / "artifact")
    address = json.loads((exported / "adapter_config.json").read_text())["base_model_name_or_path"]
    prefix = f"s3://{BUCKET}/"
    assert address.startswith(f"{prefix}runs/_bases/")
    base = download(trained, f"{address.removeprefix(prefix)}/", tmp_path / "base")
    _, plain = plain_training(tiny_model, adapter, "Merge", "LoRA")
    assert same_logits(PeftModel.from_pretrained(load_whole(base), exported).eval(), plain) < 1e-4


@pytest.mark.parametrize(("name", "method"), [("merge-lora-3", "LoRA"), ("merge-full-2", "Full")])
def test_a_model_that_was_trained_on_a_merged_base_loads_alone(
    name: str, method: str, trained: ObjectStore, tiny_model: Path, adapter: Path, tmp_path: Path
) -> None:
    exported = artifact_folder(trained, name, tmp_path / "artifact")
    _, plain = plain_training(tiny_model, adapter, "Merge", method)
    assert same_logits(load_whole(exported), plain) < 1e-4


@pytest.mark.parametrize("name", ["continue-2", "merge-lora-2", "merge-full-2"])
def test_the_artifact_says_which_adapter_it_grew_from(
    name: str, trained: ObjectStore, adapter: Path, tmp_path: Path
) -> None:
    exported = artifact_folder(trained, name, tmp_path / "artifact")
    sha256 = GivenAdapter.read(adapter).sha256
    origin = Manifest.model_validate_json((exported / "manifest.json").read_text()).adapter
    assert origin is not None
    assert (origin.use, origin.source, origin.sha256) == (CASES[name][0], "claim/adapter", sha256)
    card = (exported / "README.md").read_text()
    assert "claim/adapter" in card
    assert sha256 in card
    if (exported / "adapter_config.json").is_file():
        recorded = json.loads((exported / "adapter_config.json").read_text())["auto_mapping"]["initial_adapter"]
        assert recorded == {"use": CASES[name][0], "source": "claim/adapter", "sha256": sha256}


GENERATIONS = {
    "continue-of-merge": ("merge-lora-2", "Continue"),
    "merge-of-merge": ("merge-lora-2", "Merge"),
    "merge-of-continue": ("continue-2", "Merge"),
}
"""By name: the case of `CASES` whose artifact a second job starts from, and what this job does with the adapter."""


@pytest.mark.parametrize("name", GENERATIONS)
def test_the_artifact_of_a_job_that_started_from_an_adapter_is_the_start_of_the_next_job(
    name: str, trained: ObjectStore, tiny_model: Path, tmp_path: Path
) -> None:
    first, use = GENERATIONS[name]
    first_artifact = artifact_folder(trained, first, tmp_path / "first")
    address = json.loads((first_artifact / "adapter_config.json").read_text())["base_model_name_or_path"]
    base: dict[str, Any] = {"s3": {"uri": address}}
    if "/_bases/" not in address:
        trained.upload("models/of-the-first", tiny_model)
        base = {"s3": {"uri": f"s3://{BUCKET}/models/of-the-first"}}
    run = f"runs/default/adapter-{first}/uid-1"
    source = {"s3": {"uri": f"s3://{BUCKET}/{run}/{json.loads(trained.read(f'{run}/ARTIFACT'))['folder']}"}}
    rows = tiny.write_jsonl(tmp_path / "train.jsonl", ROWS)
    write_object(trained, f"data/{name}.jsonl", rows.read_bytes())
    config = config_of(trained, f"second-{name}", use, "LoRA", 2)
    config["model"] = base | {"adapter": source | {"use": use}}
    config["dataset"]["train"] = {"s3": {"uri": f"s3://{BUCKET}/data/{name}.jsonl"}}
    read, paths = RunConfig.model_validate(config), paths_in(tmp_path, trained)
    (tmp_path / "inputs").mkdir()
    inputs = fetch_inputs(read, paths, open_root(read, paths), tmp_path / "inputs")
    train_all([config], inputs, tmp_path / "gang", credentials=trained.credentials)
    losses, plain = plain_training(inputs.model, first_artifact, use, "LoRA")
    assert losses_of(trained, f"adapter-second-{name}") == pytest.approx(losses, rel=1e-5)
    exported = artifact_folder(trained, f"second-{name}", tmp_path / "artifact")
    said = json.loads((exported / "adapter_config.json").read_text())
    own = said["base_model_name_or_path"]
    assert (own == base["s3"]["uri"]) is (use == "Continue")
    own_base = download(trained, f"{own.removeprefix(f's3://{BUCKET}/')}/", tmp_path / "base")
    # AdamW divides each gradient by its size. So where a gradient is nearly zero, rounding may change its sign, and the
    # weight moves by the learning rate in the other direction. So the difference is compared with the change that the
    # second training made.
    difference = same_logits(PeftModel.from_pretrained(load_whole(own_base), exported).eval(), plain)
    assert difference < 2e-3 * same_logits(load_whole(own_base), plain)
    origin = said["auto_mapping"]["initial_adapter"]
    assert origin == {"use": use, "source": source["s3"]["uri"], "sha256": GivenAdapter.read(first_artifact).sha256}


def test_a_later_attempt_with_another_adapter_is_refused(
    store: ObjectStore, tiny_model: Path, adapter: Path, tmp_path: Path
) -> None:
    rows = tiny.write_jsonl(tmp_path / "train.jsonl", ROWS)
    config = config_of(store, "changed", "Continue", "LoRA", 2)
    inputs = Inputs(model=tiny_model, adapter=adapter, train=rows)
    stopped: list[dict[str, Any] | None] = [{"kind": "stop", "step": CUT + 1}]
    train_all([config], inputs, tmp_path / "first", credentials=store.credentials, faults=stopped)
    other = write_adapter(tiny_model, tmp_path / "other", seed=9)
    changed = inputs.model_copy(update={"adapter": other})
    (result,) = train_all([config], changed, tmp_path / "second", credentials=store.credentials)
    assert result.outcome is Outcome.BAD_INPUT
    assert result.message.startswith("model.adapter: is not what run 1 started from: the sha256 of its files is")


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_of_lora_are_continued_as_they_are(
    name: str, store: ObjectStore, tiny_model: Path, tmp_path: Path
) -> None:
    rows = tiny.write_jsonl(tmp_path / "train.jsonl", ROWS)
    adapter = write_adapter(tiny_model, tmp_path / "adapter", **VARIANTS[name])
    config = config_of(store, f"variant-{name}", "Continue", "LoRA", 2)
    inputs = Inputs(model=tiny_model, adapter=adapter, train=rows)
    train_all([config], inputs, tmp_path / "gang", credentials=store.credentials)
    losses, _ = plain_training(tiny_model, adapter, "Continue", "LoRA")
    assert losses_of(store, f"adapter-variant-{name}") == pytest.approx(losses, rel=1e-5)


def test_an_adapter_is_continued_on_a_quantized_base_model_as_by_plain_peft(
    store: ObjectStore, tiny_model: Path, adapter: Path, tmp_path: Path
) -> None:
    rows = tiny.write_jsonl(tmp_path / "train.jsonl", ROWS)
    config = config_of(store, "nf4", "Continue", "LoRA", 2, lora={"quantization": "NF4"})
    inputs = Inputs(model=tiny_model, adapter=adapter, train=rows)
    train_all([config], inputs, tmp_path / "gang", credentials=store.credentials)
    losses, _ = plain_training(tiny_model, adapter, "Continue", "LoRA", quantized=True)
    assert losses_of(store, "adapter-nf4") == pytest.approx(losses, rel=1e-5)
