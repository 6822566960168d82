"""The losses are those of a plain loop, whatever the number of ranks and the ZeRO stage; and so is the adapter."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from finetune_core.api.method import LoRASpec
from finetune_trainer.data.order import global_batch
from finetune_trainer.plan import Inputs
from finetune_trainer.training.model import add_adapters
from tests.trainer import tiny
from tests.trainer.gangs import step_rows, train_all
from tests.trainer.objectstore import ObjectStore
from tests.trainer.pods import run_config

STEPS = 12
RATE = 1e-3
DENSE = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def plain_losses(model_folder: Path, method: str) -> tuple[list[float], float, torch.nn.Module]:
    """Train in a single process with nothing but PyTorch; return losses, validation perplexity and the model."""
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    if method == "LoRA":
        model = add_adapters(model, LoRASpec(rank=4, alpha=8), targets=DENSE, seed=42, base_name="tiny")

    def nll(row: dict[str, str]) -> tuple[torch.Tensor, int]:
        prompt = tokenizer(tiny.TEMPLATE.replace("{prompt}", row["question"]))["input_ids"]
        ids = torch.tensor([[*prompt, *tokenizer(row["reply"])["input_ids"], tokenizer.eos_token_id]])
        log_probabilities = model(ids).logits[0, :-1].log_softmax(-1)
        wanted = log_probabilities.gather(1, ids[0, 1:, None])[len(prompt) - 1 :]
        return -wanted.sum(), len(wanted)

    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.0)
    train, losses = tiny.rows(20, seed=1), []
    for step in range(1, STEPS + 1):
        sums, counts = zip(
            *(nll(train[row]) for row in global_batch(step, rows=20, global_batch_size=6, seed=42)), strict=True
        )
        loss = sum(sums) / sum(counts)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        losses.append(float(loss))
    with torch.no_grad():
        sums, counts = zip(*(nll(row) for row in tiny.rows(7, seed=2)), strict=True)
    return losses, math.exp(float(sum(sums)) / sum(counts)), model


@pytest.fixture(scope="module")
def plain(tiny_model: Path) -> dict[str, tuple[list[float], float, torch.nn.Module]]:
    torch.set_num_threads(1)
    return {method: plain_losses(tiny_model, method) for method in ("LoRA", "Full")}


@pytest.mark.parametrize("world", [1, 2])
def test_losses_perplexity_and_weights_equal_a_plain_loop(
    world: int,
    store: ObjectStore,
    plain: dict[str, tuple[list[float], float, torch.nn.Module]],
    tiny_model: Path,
    tmp_path: Path,
) -> None:
    cases = [(method, stage) for method in ("LoRA", "Full") for stage in (0, 1, 2, 3)]
    configs = [
        run_config(
            store,
            f"exact-{world}-{method}-{stage}".lower(),
            world__nodes=world,
            method=method,
            optimization__zeroStage=stage,
            optimization__maxSteps=STEPS,
            optimization__learningRate=RATE,
            storage__checkpointEverySteps=100,
        )
        for method, stage in cases
    ]
    inputs = Inputs(
        model=tiny_model,
        train=tiny.write_jsonl(tmp_path / "train.jsonl", tiny.rows(20, seed=1)),
        validation=tiny.write_jsonl(tmp_path / "validation.jsonl", tiny.rows(7, seed=2)),
    )
    train_all(configs, inputs, tmp_path, credentials=store.credentials)
    for method, stage in cases:
        losses, perplexity, model = plain[method]
        name = f"exact-{world}-{method}-{stage}".lower()
        rows = step_rows(store, name)
        assert [row.loss for row in rows] == pytest.approx(losses, rel=1e-6), (method, stage)
        assert rows[-1].perplexity == pytest.approx(perplexity, rel=1e-6), (method, stage)
        artifact = download_artifact(store, name, tmp_path / name)
        assert_same_weights(artifact, model, f"{method} {stage}")
        assert_loads_and_computes_the_same(artifact, tiny_model, model)


def download_artifact(store: ObjectStore, name: str, target: Path) -> Path:
    target.mkdir()
    folder = f"runs/default/{name}/uid-1/{json.loads(store.read(f'runs/default/{name}/uid-1/ARTIFACT'))['folder']}"
    for key in store.keys(f"{folder}/"):
        (target / key.rpartition("/")[2]).write_bytes(store.read(key))
    return target


def assert_same_weights(artifact: Path, model: torch.nn.Module, case: str) -> None:
    weights = {key: value for file in artifact.glob("*.safetensors") for key, value in load_file(file).items()}
    expected = {key.replace(".default.", "."): value for key, value in model.named_parameters() if value.requires_grad}
    assert weights.keys() == expected.keys()
    for key, value in weights.items():
        torch.testing.assert_close(value, expected[key].detach(), rtol=1e-4, atol=1e-6, msg=f"{case} {key}")


def assert_loads_and_computes_the_same(artifact: Path, base: Path, model: torch.nn.Module) -> None:
    """A person's own few lines of peft and transformers give the trained model."""
    if (artifact / "adapter_config.json").exists():
        loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), artifact)
        config = json.loads((artifact / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == "s3://finetune/models/tiny"
    else:
        loaded = AutoModelForCausalLM.from_pretrained(artifact)
    ids = torch.tensor([AutoTokenizer.from_pretrained(artifact)("ask w1 w2 w3 answer w3")["input_ids"]])
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-5)
