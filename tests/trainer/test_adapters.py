"""The artifact of a LoRA run with added tokens holds everything that plain peft needs to load it.

The adapter on the extended base model (the base model with rows for the added tokens), the merged model and the
trainer's own model compute the same logits.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from finetune_core.api.method import LoRASpec
from finetune_core.contract import Identity, RunConfig
from finetune_core.errors import UserError
from finetune_core.layout import Manifest
from finetune_trainer.checkpoints.export import NEW_ROWS_FILE, ExportOptions, export_artifact
from finetune_trainer.data.tokenizer import add_tokens, load_tokenizer
from finetune_trainer.engine.state import load_weights
from finetune_trainer.model.adapters import add_adapters, choose_targets
from finetune_trainer.model.added_rows import AddedRows, read_added_rows
from finetune_trainer.model.extended_base import extend_base, initial_row
from finetune_trainer.model.load import trained_parameters
from finetune_trainer.model.structure import ModelStructure, read_structure
from finetune_trainer.model.weight_files import WeightFiles
from finetune_trainer.pod.model_file_names import ADAPTER_FILE
from finetune_trainer.pod.plan import Inputs, WorkerPlan
from finetune_trainer.pod.settings import Paths
from finetune_trainer.preparation import load_model, prepare_node
from tests.trainer import tiny
from tests.trainer.gangs import train_all
from tests.trainer.objectstore import BUCKET, ObjectStore
from tests.trainer.pods import run_config

pytestmark = pytest.mark.gang

TOKENS = ["<START_Q>", "<END_Q>", "<START_A>", "<END_A>"]
FORMAT = {
    "promptCompletion": {
        "promptField": "question",
        "completionField": "reply",
        "template": "<START_Q>{prompt}<END_Q><START_A>",
        "completionSuffix": "<END_A>",
    }
}
SHARD_EVERYTHING = '{"zero_optimization": {"stage3_param_persistence_threshold": 0}}'
"""DeepSpeed settings that make ZeRO-3 shard every parameter.

By default ZeRO-3 keeps small parameters whole on every rank, and the tiny model has only small parameters.
"""
PROMPT = "<START_Q>w1 w2 w3<END_Q><START_A>w3"


@dataclass(frozen=True)
class Trained:
    """A finished run: its base model, config, checkpoints and artifact."""

    name: str
    artifact: Path
    base: Path
    """The extended base model, downloaded from the address in adapter_config.json."""
    checkpoint: Path
    model: Path
    config: dict[str, Any]

    def adapted(self, base: Path, dtype: torch.dtype) -> Any:
        """Load the adapter on ``base`` with plain peft, as a user would.

        `autocast_adapter_dtype=False` keeps a bf16 adapter in bf16. By default peft would convert the adapter to fp32,
        but the trainer computes in bf16.
        """
        model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
        return PeftModel.from_pretrained(model, self.artifact, autocast_adapter_dtype=False).eval()

    def ids(self) -> torch.Tensor:
        return torch.tensor([AutoTokenizer.from_pretrained(self.artifact)(PROMPT)["input_ids"]])


def fetch(store: ObjectStore, prefix: str, target: Path) -> Path:
    for key in store.keys(f"{prefix}/"):
        path = target / key.removeprefix(f"{prefix}/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(store.read(key))
    return target


@pytest.fixture(scope="module")
def trained(store: ObjectStore, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Trained]:
    """Train LoRA runs with added tokens, and return them by name.

    The base models have tied or untied embeddings, and the runs compute in fp32 or bf16.
    """
    folder = tmp_path_factory.mktemp("adapters")
    models = {tied: tiny.write_model(folder / f"tied-{tied}", tied=tied, files="60KB") for tied in (False, True)}
    rows = {
        name: tiny.write_jsonl(folder / f"{name}.jsonl", tiny.rows(count, seed=seed))
        for name, count, seed in (("train", 20, 1), ("validation", 5, 2))
    }
    cases = {
        "untied": (False, {"optimization__zeroStage": 3, "storage__artifact": "Both"}),
        "tied": (True, {"optimization__gradientCheckpointing": True, "storage__artifact": "Both"}),
        "untied-bf16": (False, {"optimization__zeroStage": 2, "optimization__precision": "bf16"}),
        "tied-bf16": (True, {"optimization__zeroStage": 3, "optimization__precision": "bf16"}),
    }  # fmt: skip
    configs, inputs = [], []
    for name, (tied, changes) in cases.items():
        options: dict[str, Any] = {
            "model": {"s3": {"uri": f"s3://{BUCKET}/models/tiny"}, "addedTokens": TOKENS},
            "dataset__format": FORMAT,
            "optimization__maxSteps": 8,
            "optimization__learningRate": 1e-2,
            "optimization__overrides": SHARD_EVERYTHING,
            "storage__checkpointEverySteps": 1,
            "storage__keepLast": 9,
        }
        configs.append(run_config(store, f"adapter-{name}", **(options | changes)))
        inputs.append(Inputs(model=models[tied], train=rows["train"], validation=rows["validation"]))
    train_all(configs, inputs, folder / "gang", credentials=store.credentials)
    found = {}
    for (name, (tied, _)), config in zip(cases.items(), configs, strict=True):
        run = f"runs/default/adapter-{name}/uid-1"
        artifact = fetch(store, f"{run}/artifacts/000001", folder / name / "artifact")
        uri = json.loads((artifact / "adapter_config.json").read_text())["base_model_name_or_path"]
        base = fetch(store, uri.removeprefix(f"s3://{BUCKET}/"), folder / name / "base")
        checkpoint = fetch(store, f"{run}/checkpoints", folder / name / "checkpoints")
        found[name] = Trained(name, artifact, base, checkpoint, models[tied], config)
    return found


def test_trap_1_new_rows_not_saved(trained: dict[str, Trained]) -> None:
    """On the extended base model, the adapter computes the trainer's logits bit for bit.

    With untied embeddings the adapter also computes these logits on the plain base model, once the embedding rows from
    the adapter's folder are added to this model. The adapter is loaded under another random seed, so that a row that
    was not saved would be noticed.
    """
    for name in ("untied", "untied-bf16", "tied-bf16"):
        run, dtype = trained[name], torch.bfloat16 if "bf16" in name else torch.float32
        engine_model = as_the_engine_had_it(run)
        torch.manual_seed(999)
        ids = run.ids()
        with torch.no_grad():
            wanted = engine_model(ids).logits
            assert torch.equal(run.adapted(run.base, dtype)(ids).logits, wanted), name
        if name.startswith("untied"):
            plain = AutoModelForCausalLM.from_pretrained(run.model, dtype=dtype)
            tokenizer = AutoTokenizer.from_pretrained(run.artifact)
            plain.resize_token_embeddings(len(tokenizer))
            without = PeftModel.from_pretrained(plain, run.artifact, autocast_adapter_dtype=False).eval()
            with torch.no_grad():
                assert float((without(ids).logits - wanted).abs().max()) > 0.1
                rows = load_file(run.artifact / NEW_ROWS_FILE)
                plain.get_input_embeddings().weight[-len(TOKENS) :] = rows["input_embeddings"]
                plain.get_output_embeddings().weight[-len(TOKENS) :] = rows["output_embeddings"]
                assert torch.equal(without(ids).logits, wanted), name


def as_the_engine_had_it(run: Trained) -> Any:
    """Return the model as the trainer builds it, with the weights of the last checkpoint."""
    folder = Path(tempfile.mkdtemp(dir=run.checkpoint.parent)) / "attempt"
    config = {**run.config, "optimization": {**run.config["optimization"], "zeroStage": 2}}
    identity = Identity(namespace="n", name="n", uid="u", attempt=1, pod_name="p", pod_uid="p", node_rank=0)
    train = tiny.write_jsonl(run.checkpoint.parent / "train.jsonl", tiny.rows(4, seed=1))
    plan = WorkerPlan(
        paths=Paths(),
        identity=identity,
        config=RunConfig.model_validate(config),
        inputs=Inputs(model=run.model, train=train),
        folder=folder,
    )
    prepare_node(plan, graded=())
    model = load_model(plan)
    load_weights(trained_parameters(model), sorted(run.checkpoint.iterdir())[-1])
    return model.eval()


def test_trap_2_zero_3_leaves_no_tensor_empty(trained: dict[str, Trained]) -> None:
    for name, run in trained.items():
        adapter = load_file(run.artifact / ADAPTER_FILE)
        table = expected_shapes(read_structure(run.model), added=len(TOKENS))
        assert {key: tuple(value.shape) for key, value in adapter.items()} == table, name
        assert all(value.abs().sum() > 0 for value in adapter.values()), name


def expected_shapes(structure: ModelStructure, *, added: int, rank: int = 4) -> dict[str, tuple[int, ...]]:
    """Return the shapes that the tensors of an adapter must have. The shapes follow from the model's configuration, the
    number ``added`` of added tokens, and ``rank``."""
    config = structure.model.config
    hidden, inner, vocabulary = config.hidden_size, config.intermediate_size, config.vocab_size + added
    head = hidden // config.num_attention_heads * config.num_key_value_heads
    table: dict[str, tuple[int, ...]] = {}
    for layer in range(config.num_hidden_layers):
        for module, (width, height) in {
            "self_attn.q_proj": (hidden, hidden),
            "self_attn.k_proj": (hidden, head),
            "self_attn.v_proj": (hidden, head),
            "self_attn.o_proj": (hidden, hidden),
            "mlp.gate_proj": (hidden, inner),
            "mlp.up_proj": (hidden, inner),
            "mlp.down_proj": (inner, hidden),
        }.items():
            prefix = f"base_model.model.model.layers.{layer}.{module}"
            table |= {f"{prefix}.lora_A.weight": (rank, width), f"{prefix}.lora_B.weight": (height, rank)}
    embedding, output = "base_model.model.model.embed_tokens", "base_model.model.lm_head"
    table |= {f"{embedding}.lora_embedding_A": (rank, vocabulary), f"{embedding}.lora_embedding_B": (hidden, rank)}
    return table | {f"{output}.lora_A.weight": (rank, hidden), f"{output}.lora_B.weight": (vocabulary, rank)}


def test_trap_3_nothing_but_adapters_and_new_rows_is_stored(trained: dict[str, Trained]) -> None:
    for name, run in trained.items():
        rows = load_file(run.artifact / NEW_ROWS_FILE)
        matrices = {"input_embeddings"} if name.startswith("tied") else {"input_embeddings", "output_embeddings"}
        assert rows.keys() == matrices, name
        assert all(tuple(value.shape) == (len(TOKENS), 64) for value in rows.values()), name
        files = {path.relative_to(run.artifact).as_posix() for path in run.artifact.rglob("*.safetensors")}
        assert {file for file in files if "/" not in file} == {ADAPTER_FILE, NEW_ROWS_FILE}, name


def test_trap_3_a_7b_adapter_with_its_rows_is_at_most_41_3_mb(tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=32004, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32
    )
    with torch.device("meta"):
        base = LlamaForCausalLM(config).to(torch.bfloat16)
    structure = ModelStructure(base, "model.embed_tokens", "lm_head", tied=False, rows=32004, context=4096)
    targets = choose_targets(structure, LoRASpec(), added_tokens=True).modules
    model = add_adapters(base, LoRASpec(), targets=targets, seed=1, base_name="7b")
    shapes = {name: parameter.shape for name, parameter in trained_parameters(model).items()}
    parameters = 20_566_080
    assert sum(shape.numel() for shape in shapes.values()) == parameters
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    save_file(
        {f"{name}/master": torch.zeros(shape) for name, shape in shapes.items()}, checkpoint / "state-0.safetensors"
    )
    # The export reads only the embedding rows of the four added tokens from the base model, so this file holds nothing
    # else.
    rows = {name: torch.zeros((4, 4096), dtype=torch.bfloat16) for name in ("in.weight", "out.weight")}
    base_folder = tmp_path / "base"
    base_folder.mkdir()
    save_file(rows, base_folder / "model.safetensors")
    options = ExportOptions(
        kind="Adapter",
        precision="bf16",
        base=base_folder,
        base_name="7b",
        added_rows=AddedRows(ids=[0, 1, 2, 3], input_key="in.weight", output_key="out.weight"),
        stop_ids=[2],
    )
    files = export_artifact(
        model, load_tokenizer(tiny.write_model(tmp_path / "tiny")), checkpoint, tmp_path / "artifact", options
    )
    sizes = {path.name: path.stat().st_size for path in files}
    total = sizes[ADAPTER_FILE] + sizes[NEW_ROWS_FILE]
    print(f"7B adapter: {sizes[ADAPTER_FILE]:,} bytes, rows {sizes[NEW_ROWS_FILE]:,}, together {total:,}")
    assert total <= 41_300_000
    assert total <= 1.02 * (2 * parameters + 4 * 2 * 4096 * 2)


def test_trap_4_new_rows_follow_from_seed_and_token_alone(tmp_path: Path, trained: dict[str, Trained]) -> None:
    model = trained["untied"].model
    digests = []
    for number, tokens in enumerate((TOKENS, TOKENS, TOKENS[::-1])):
        torch.manual_seed(number)
        folder = tmp_path / str(number)
        extend_base(model, folder, tokens=tokens, untie=False, seed=42)
        ids = [load_tokenizer(folder).convert_tokens_to_ids(token) for token in TOKENS]
        rows = read_added_rows(
            folder,
            AddedRows(ids=ids, input_key="model.embed_tokens.weight", output_key="lm_head.weight"),
            torch.float32,
        )
        digests.append(hashlib.sha256(b"".join(value.numpy().tobytes() for value in rows.values())).hexdigest())
    assert len(set(digests)) == 1
    states = [
        json.loads((folder / "trainer.json").read_text()) for folder in sorted(trained["untied"].checkpoint.iterdir())
    ]
    assert len({state["rowsSha256"] for state in states}) == 1
    assert states[0]["rowsSha256"] != states[0]["baseSha256"]
    first, second = (
        initial_row("<a>", matrix=matrix, width=4096, spread=0.02, seed=1) for matrix in ("input", "output")
    )
    assert float(first.std()) == pytest.approx(0.02, rel=0.05)
    assert not torch.equal(first, second)


def test_trap_11_every_adapter_learns_and_the_base_does_not(trained: dict[str, Trained]) -> None:
    for name, run in trained.items():
        steps = [masters(folder) for folder in sorted(run.checkpoint.iterdir())]
        # There may be fewer checkpoints than steps, because snapshots are dropped while the object store is slow.
        assert len(steps) >= 2
        zero_at_first = [key for key in steps[0] if "lora_B" in key or "embedding_A" in key]
        assert all(steps[0][key].abs().sum() > 0 for key in zero_at_first), name
        moved = [key for key in steps[0] if not torch.equal(steps[0][key], steps[1][key])]
        assert set(moved) == set(steps[0]), name
        given, extended = WeightFiles.of(run.model), WeightFiles.of(run.base)
        for key in given.files:
            weight = given.tensor(key)
            assert torch.equal(extended.tensor(key)[: weight.shape[0]], weight), (name, key)


def masters(folder: Path) -> dict[str, torch.Tensor]:
    tensors = {key: value for path in folder.glob("state-*.safetensors") for key, value in load_file(path).items()}
    return {key: value for key, value in tensors.items() if key.endswith("/master")}


@pytest.mark.parametrize("name", ["untied", "tied"])
def test_trap_29_adapter_extended_base_and_merged_model_agree(name: str, trained: dict[str, Trained]) -> None:
    run = trained[name]
    adapted = run.adapted(run.base, torch.float32)
    merged = AutoModelForCausalLM.from_pretrained(run.artifact / "merged", dtype=torch.float32).eval()
    engine_model = as_the_engine_had_it(run)
    ids = run.ids()
    with torch.no_grad():
        wanted = engine_model(ids).logits
        torch.testing.assert_close(adapted(ids).logits, wanted, rtol=0, atol=1e-5)
        torch.testing.assert_close(merged(ids).logits, wanted, rtol=0, atol=1e-5)
    end = load_tokenizer(run.artifact).convert_tokens_to_ids("<END_A>")
    asked = {"max_new_tokens": 12, "do_sample": False, "use_cache": True, "pad_token_id": 1, "eos_token_id": [1, end]}
    assert merged.generate(ids, **asked).tolist() == adapted.generate(input_ids=ids, **asked).tolist()
    assert merged.config.vocab_size == adapted.config.vocab_size == 64 + len(TOKENS)
    assert merged.generation_config.eos_token_id == [1, end]


def test_an_extended_base_is_stored_once_for_all_runs(store: ObjectStore, trained: dict[str, Trained]) -> None:
    uris = {
        name: json.loads((run.artifact / "adapter_config.json").read_text())["base_model_name_or_path"]
        for name, run in trained.items()
    }
    assert uris["untied"] == uris["untied-bf16"] != uris["tied"] == uris["tied-bf16"]
    for name, uri in uris.items():
        digest = uri.rpartition("/")[2]
        manifest = (trained[name].base / "manifest.json").read_bytes()
        assert hashlib.sha256(manifest).hexdigest() == digest
        for file in Manifest.model_validate_json(manifest).files:
            assert hashlib.sha256((trained[name].base / file.name).read_bytes()).hexdigest() == file.sha256
        assert uri == f"s3://{BUCKET}/runs/_bases/{digest}"
    assert len(store.keys("runs/_bases/")) == sum(
        len(list(trained[name].base.iterdir())) for name in ("untied", "tied")
    )


def test_trap_23_tokenizer_with_added_tokens(tmp_path: Path) -> None:
    """A tokenizer of Llama's kind puts a space mark before words. An added token must not change how the text around it
    is tokenized."""
    tokenizer = load_tokenizer(tiny.write_llama_tokenizer(tmp_path))
    before = len(tokenizer)
    ids = add_tokens(tokenizer, TOKENS)
    assert ids == [before, before + 1, before + 2, before + 3]
    assert len(tokenizer) == before + 4
    tokenizer.save_pretrained(tmp_path / "saved")
    tokenizer = load_tokenizer(tmp_path / "saved")
    text = "<START_Q>what is it<END_Q><START_A>inform(name[it])<END_A>"
    whole = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(whole).replace(" ", "") == text.replace(" ", "")
    assert [whole[0], whole[-1]] == [ids[0], ids[3]]
    assert tokenizer.tokenize("<END_A>inform") == ["<END_A>", *tokenizer.tokenize("inform")]
    prompt = tokenizer("<START_Q>what is it<END_Q><START_A>", add_special_tokens=False)["input_ids"]
    answer = tokenizer("inform(name[it])<END_A>", add_special_tokens=False)["input_ids"]
    assert [*prompt, *answer] == whole
    with pytest.raises(UserError, match=r"^model.addedTokens: must not hold '<END_A>'"):
        add_tokens(tokenizer, ["<END_A>"])


def test_targets_are_all_dense_layers_and_both_embeddings_where_tokens_are_added(tiny_model: Path) -> None:
    structure = read_structure(tiny_model)
    dense = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    assert choose_targets(structure, LoRASpec(), added_tokens=False).modules == dense
    with_embeddings = choose_targets(structure, LoRASpec(), added_tokens=True).modules
    assert with_embeddings == sorted([*dense, "embed_tokens", "lm_head"])
    named = LoRASpec(target_modules=["v_proj"])
    assert choose_targets(structure, named, added_tokens=True).modules == ["v_proj"]
    with pytest.raises(UserError, match=r"^lora.targetModules: must name modules of the model, and 'q_prj' is none"):
        choose_targets(structure, LoRASpec(target_modules=["v_proj", "q_prj"]), added_tokens=False)
