"""Losses and artifact equal those of a plain PyTorch training loop, for any number of ranks, ZeRO stage, accumulation,
gradient checkpointing, offload and packing.
"""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from finetune_trainer.data.order import global_batch
from finetune_trainer.loss.head import CHUNK_LOGITS
from finetune_trainer.pod.plan import Inputs
from tests.trainer import tiny
from tests.trainer.gangs import RUN_SECONDS, losses_of, step_rows, train_all
from tests.trainer.objectstore import ObjectStore
from tests.trainer.plain_loop import Plain, PlainExample, plain_loop
from tests.trainer.pods import run_config

STEPS = 20
RATE = 1e-3
DECAY = 0.1
GLOBAL_BATCH = 6
MATRIX_SECONDS = 1800
Rows = list[dict[str, str]]


def plain_run(
    folder: Path,
    method: str,
    train: Rows,
    validation: Rows,
    *,
    global_batch_size: int = GLOBAL_BATCH,
    weight_decay: float = 0.0,
    dtype: torch.dtype = torch.float32,
) -> Plain:
    tokenizer = AutoTokenizer.from_pretrained(folder)

    def example(row: dict[str, str]) -> PlainExample:
        prompt = tokenizer(tiny.TEMPLATE.replace("{prompt}", row["question"]))["input_ids"]
        answer = [*tokenizer(row["reply"])["input_ids"], tokenizer.eos_token_id]
        return PlainExample([*prompt, *answer], [False] * len(prompt) + [True] * len(answer))

    batches = [
        global_batch(step, rows=len(train), global_batch_size=global_batch_size, seed=42)
        for step in range(1, STEPS + 1)
    ]
    return plain_loop(
        folder,
        method,
        [example(row) for row in train],
        [example(row) for row in validation],
        batches,
        rate=RATE,
        weight_decay=weight_decay,
        dtype=dtype,
    )


TRAIN, VALIDATION = tiny.rows(20, seed=1), tiny.rows(7, seed=2)


@pytest.fixture(scope="module")
def plain(tiny_model: Path) -> dict[tuple[str, float], Plain]:
    """The plain training loop's results by method and weight decay."""
    torch.set_num_threads(1)
    return {
        (method, decay): plain_run(tiny_model, method, TRAIN, VALIDATION, weight_decay=decay)
        for method, decay in itertools.product(("LoRA", "Full"), (0.0, DECAY))
    }


@dataclass(frozen=True)
class Case:
    """One configuration of the trainer, whose losses must equal those of the plain loop or of another case.

    ``micro`` is the largest number of examples, or of packed sequences, in a micro-batch. A rank computes its
    micro-batches one after another.
    """

    world: int
    method: str
    stage: int | None
    """ZeRO stage; None for the plain engine."""
    micro: int = 3
    recompute: bool = False
    offload: str = ""
    packing: bool = False
    precision: str = "fp32"
    dropout: str = "0"
    decay: float = 0.0
    repetition: int = 0
    data: str = ""
    """First word of the job's name, for a case with another model or other rows.

    Under the usual name such a case would find the artifact of the usual case in the bucket, and train nothing.
    """

    @property
    def name(self) -> str:
        flags = f"{self.micro}{'r' * self.recompute}{self.offload}{'p' * self.packing}{'d' * (self.dropout != '0')}"
        flags += "w" * (self.decay != 0)
        kind = f"{self.data or 'exact'}-{self.world}-{self.method}-{self.stage}"
        return f"{kind}-{flags}-{self.precision}-{self.repetition}".lower()

    def config(self, store: ObjectStore, **changes: Any) -> dict[str, Any]:
        options = {
            "world__nodes": self.world,
            "method": self.method,
            "lora": {"rank": 4, "alpha": 8, "dropout": self.dropout},
            "dataset__packing": self.packing,
            "optimization__zeroStage": self.stage,
            "optimization__maxSteps": STEPS,
            "optimization__learningRate": RATE,
            "optimization__weightDecay": self.decay,
            "optimization__globalBatchSize": GLOBAL_BATCH,
            "optimization__microBatchSize": self.micro,
            "optimization__gradientCheckpointing": self.recompute,
            "optimization__precision": self.precision,
            "optimization__offloadOptimizer": bool(self.offload),
            "optimization__offloadParameters": self.offload == "both",
            "storage__checkpointEverySteps": 100,
        }
        return run_config(store, self.name, **(options | changes))


def run(
    cases: Sequence[Case],
    store: ObjectStore,
    model: Path,
    folder: Path,
    *,
    rows: Sequence[Mapping[str, Any]] = TRAIN,
    scored: Sequence[Mapping[str, Any]] = VALIDATION,
    seconds: float = RUN_SECONDS,
    **changes: Any,
) -> dict[Case, list[float]]:
    """Train all cases and return the losses of each case. All cases must have the same number of ranks."""
    inputs = Inputs(
        model=model,
        train=tiny.write_jsonl(folder / "train.jsonl", rows),
        validation=tiny.write_jsonl(folder / "validation.jsonl", scored),
    )
    configs = [case.config(store, **changes) for case in cases]
    train_all(configs, inputs, folder, credentials=store.credentials, seconds=seconds)
    losses = {case: losses_of(store, case.name) for case in cases}
    assert all(len(found) == STEPS for found in losses.values())
    return losses


def assert_like_plain(
    losses: dict[Case, list[float]], plain: dict[tuple[str, float], Plain], store: ObjectStore
) -> None:
    worst = 0.0
    for case, found in losses.items():
        wanted = plain[case.method, case.decay]
        worst = max(worst, *(abs(a - b) / b for a, b in zip(found, wanted.losses, strict=True)))
        assert found == pytest.approx(wanted.losses, rel=1e-6), case
        assert step_rows(store, case.name)[-1].perplexity == pytest.approx(wanted.perplexity, rel=1e-6), case
    print(f"{len(losses)} cases, largest relative difference of a loss {worst:.2g}")


ONE_RANK = [
    Case(1, "LoRA", 0, micro=6),
    Case(1, "Full", 3, micro=2, recompute=True),
    Case(1, "Full", 1, micro=4, packing=True),
    Case(1, "LoRA", None, micro=1, packing=True),
    Case(1, "Full", None, micro=4, recompute=True, decay=DECAY),
]
TWO_RANKS = [
    Case(2, "LoRA", 2, packing=True),
    Case(2, "LoRA", 3, micro=1, recompute=True, decay=DECAY),
    Case(2, "Full", 0, packing=True, decay=DECAY),
    Case(2, "Full", 1, micro=1),
    Case(2, "Full", 2, recompute=True, micro=2, offload="optimizer"),
    Case(2, "Full", 3, offload="both", micro=1),
]
TWO_RANKS_FURTHER = [
    Case(2, "LoRA", 0, micro=1),
    Case(2, "LoRA", 1, recompute=True, offload="optimizer"),
    Case(2, "Full", 3, decay=DECAY),
]


@pytest.mark.gang
@pytest.mark.parametrize(
    "cases",
    [
        pytest.param(ONE_RANK, id="1"),
        pytest.param(TWO_RANKS, id="2"),
        pytest.param(TWO_RANKS_FURTHER, id="2 further", marks=pytest.mark.long),
    ],
)
def test_trap_5_topology_dependent_loss(
    cases: list[Case], store: ObjectStore, plain: dict[tuple[str, float], Plain], tiny_model: Path, tmp_path: Path
) -> None:
    losses = run(cases, store, tiny_model, tmp_path)
    assert_like_plain(losses, plain, store)
    for case in losses:
        artifact = download_artifact(store, case.name, tmp_path / case.name)
        wanted = plain[case.method, case.decay].model
        assert_same_weights(artifact, wanted, case.name)
        assert_loads_and_computes_the_same(artifact, tiny_model, wanted)


FORGETFUL = (
    "{% for m in messages %}{% if m.role == 'user' and loop.index0 >= messages | length - 2 %}ask {{ m.content }}"
    " answer {% elif loop.last %}{{ m.content }}<end>{% endif %}{% endfor %}"
)
"""A chat template that shows the last question only, and so makes one example of each answer."""


def as_conversations(rows: Rows) -> list[dict[str, Any]]:
    """Return ``rows`` as conversations of two questions each. If the number of rows is odd, the last conversation has
    one question."""
    turns = [
        [{"role": "user", "content": row["question"]}, {"role": "assistant", "content": row["reply"]}] for row in rows
    ]
    return [{"messages": [*first, *second]} for first, second in zip(turns[::2], [*turns[1::2], []], strict=False)]


@pytest.mark.gang
def test_conversations_that_become_several_examples_train_like_rows_with_one(
    store: ObjectStore, plain: dict[tuple[str, float], Plain], tiny_model: Path, tmp_path: Path
) -> None:
    cases = [
        Case(2, "LoRA", 2, packing=True, data="conversations"),
        Case(2, "Full", 3, micro=1, data="conversations"),
    ]
    train, validation = as_conversations(TRAIN), as_conversations(VALIDATION)
    form = {"messages": {"chatTemplate": {"text": FORGETFUL}}}
    losses = run(cases, store, tiny_model, tmp_path, rows=train, scored=validation, dataset__format=form)
    assert_like_plain(losses, plain, store)
    artifact = download_artifact(store, cases[1].name, tmp_path / "artifact")
    assert AutoTokenizer.from_pretrained(artifact).chat_template == FORGETFUL


@pytest.mark.long
@pytest.mark.timeout(MATRIX_SECONDS + 60)
@pytest.mark.parametrize("method", ["LoRA", "Full"])
@pytest.mark.parametrize("world", [1, 2, 4])
def test_trap_5_topology_dependent_loss_in_every_combination(
    world: int,
    method: str,
    store: ObjectStore,
    plain: dict[tuple[str, float], Plain],
    tiny_model: Path,
    tmp_path: Path,
) -> None:
    """Every ZeRO stage is tested with accumulation, gradient checkpointing, packing and weight decay.

    Accumulation and gradient checkpointing are also combined. Offload is tested at the stages where DeepSpeed supports
    it. One process also trains without DeepSpeed.
    """
    stages = (0, 1, 2, 3, *((None,) if world == 1 else ()))
    cases = [
        Case(world, method, stage, micro=micro, recompute=recompute)
        for stage, micro, recompute in itertools.product(stages, (1, 6), (False, True))
    ]
    cases += [Case(world, method, stage, offload="optimizer") for stage in (1, 2, 3)]
    cases += [Case(world, method, 3, offload="both"), Case(world, method, 3, micro=1, recompute=True, offload="both")]
    cases += [Case(world, method, stage, packing=True, micro=1) for stage in stages]
    cases += [Case(world, method, stage, decay=DECAY) for stage in stages]
    assert_like_plain(run(cases, store, tiny_model, tmp_path, seconds=MATRIX_SECONDS), plain, store)


@pytest.mark.long
def test_bf16_is_near_fp32_and_equal_to_itself(
    store: ObjectStore, plain: dict[tuple[str, float], Plain], tiny_model: Path, tmp_path: Path
) -> None:
    cases = [
        Case(2, method, stage, micro=1, precision="bf16", repetition=repetition)
        for method, stage in (("LoRA", 2), ("Full", 1), ("Full", 3))
        for repetition in (0, 1)
    ]
    losses = run(cases, store, tiny_model, tmp_path)
    for first, second in zip(cases[::2], cases[1::2], strict=True):
        assert losses[first] == losses[second], first
        assert losses[first] == pytest.approx(plain[first.method, 0.0].losses, rel=1e-2), first
        assert artifact_bytes(store, first.name) == artifact_bytes(store, second.name), first


@pytest.mark.long
def test_dropout_belongs_to_the_example_whatever_computes_it(
    store: ObjectStore, plain: dict[tuple[str, float], Plain], tiny_model: Path, tmp_path: Path
) -> None:
    cases = [
        Case(2, "LoRA", 2, dropout="0.1"),
        Case(2, "LoRA", 3, dropout="0.1", micro=1, recompute=True),
        Case(2, "LoRA", 1, dropout="0.1", packing=True),
    ]
    losses = run(cases, store, tiny_model, tmp_path)
    first = losses[cases[0]]
    assert first != pytest.approx(plain["LoRA", 0.0].losses, rel=1e-6)
    for case in cases[1:]:
        assert losses[case] == pytest.approx(first, rel=1e-6), case


def uneven_rows() -> Rows:
    """Return rows whose completions have alternately 2 and 1,000 tokens, including the end token."""
    rng = random.Random(5)
    made = []
    for index in range(8):
        words = " ".join(rng.choices(tiny.WORDS, k=999)) if index % 2 else ""
        made.append({"question": f"w{index}", "reply": words or "w1"})
    return made


@pytest.mark.long
def test_ranks_with_one_and_a_thousand_tokens_and_ranks_with_none_do_not_hang(
    store: ObjectStore, tmp_path: Path
) -> None:
    """Four ranks share two examples per step, and a single row for evaluation.

    So some ranks have nothing to compute.
    """
    model = tiny.write_model(tmp_path / "long", max_position_embeddings=1100)
    rows = uneven_rows()
    data = "uneven"
    cases = [
        Case(4, "Full", 3, micro=1, data=data),
        Case(4, "LoRA", 2, micro=2, packing=True, data=data),
        Case(4, "LoRA", 0, data=data),
    ]
    changes = {
        "optimization__globalBatchSize": 2,
        "dataset__maxLength": 1100,
    }
    losses = run(cases, store, model, tmp_path, rows=rows, scored=VALIDATION[:1], **changes)
    torch.set_num_threads(1)
    wanted = {
        (method, 0.0): plain_run(model, method, rows, VALIDATION[:1], global_batch_size=2)
        for method in ("LoRA", "Full")
    }
    assert_like_plain(losses, wanted, store)


@pytest.mark.long
def test_heads_with_two_chunks_on_one_rank_and_one_on_the_other_do_not_hang(store: ObjectStore, tmp_path: Path) -> None:
    """A row of 1,000 tokens needs two chunks of logits, and a row of 2 tokens needs one. In a step with one row of each
    kind, the two ranks compute different numbers of chunks.

    Under ZeRO-3, computing a chunk must not involve a collective, because the ranks would wait for each other.
    """
    model = tiny.write_model(tmp_path / "large", max_position_embeddings=1100, vocab_size=40_000)
    assert CHUNK_LOGITS < 1000 * 40_000
    rows, scored = uneven_rows(), VALIDATION[:1]
    changes = {"optimization__globalBatchSize": 2, "dataset__maxLength": 1100}
    case = Case(2, "Full", 3, micro=1, data="chunks")
    found = run([case], store, model, tmp_path, rows=rows, scored=scored, **changes)[case]
    torch.set_num_threads(1)
    # The plain loop computes in fp64 here, because its losses in fp32 differ by 4.4e-6 from those in fp64. The plain
    # loop computes all logits of a row at once, and in fp32 Adam amplifies the rounding errors: Adam divides the
    # gradients of 40,000 rarely seen tokens by their own magnitude.
    plain = plain_run(model, "Full", rows, scored, global_batch_size=2, dtype=torch.float64)
    print(f"largest relative difference {max(abs(a - b) / b for a, b in zip(found, plain.losses, strict=True)):.2g}")
    assert found == pytest.approx(plain.losses, rel=1e-6)


def download_artifact(store: ObjectStore, name: str, target: Path) -> Path:
    target.mkdir()
    folder = f"runs/default/{name}/uid-1/{json.loads(store.read(f'runs/default/{name}/uid-1/ARTIFACT'))['folder']}"
    for key in store.keys(f"{folder}/"):
        path = target / key.removeprefix(f"{folder}/")
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(store.read(key))
    return target


def artifact_bytes(store: ObjectStore, name: str) -> dict[str, bytes]:
    keys = [key for key in store.keys(f"runs/default/{name}/uid-1/artifacts/") if key.endswith(".safetensors")]
    return {key.rpartition("/")[2]: store.read(key) for key in keys}


def assert_same_weights(artifact: Path, model: torch.nn.Module, case: str) -> None:
    weights = {key: value for file in artifact.glob("*.safetensors") for key, value in load_file(file).items()}
    expected = {key.replace(".default.", "."): value for key, value in model.named_parameters() if value.requires_grad}
    assert weights.keys() == expected.keys()
    for key, value in weights.items():
        torch.testing.assert_close(value, expected[key].detach(), rtol=1e-4, atol=1e-6, msg=f"{case} {key}")


def assert_loads_and_computes_the_same(artifact: Path, base: Path, model: torch.nn.Module) -> None:
    """Assert that plain peft and transformers load the artifact, and compute the trained ``model``'s logits."""
    if (artifact / "adapter_config.json").exists():
        loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), artifact)
        config = json.loads((artifact / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == "s3://finetune/models/tiny"
    else:
        loaded = AutoModelForCausalLM.from_pretrained(artifact)
    ids = torch.tensor([AutoTokenizer.from_pretrained(artifact)("ask w1 w2 w3 answer w3")["input_ids"]])
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-5)
