"""The loss of a model in one process: with chunks, dropout, gradient checkpointing and packing.

Packed examples must not attend to each other with any attention backend.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from finetune_core.api.method import LoRASpec
from finetune_core.errors import UserError
from finetune_trainer.data.batches import Batch, collate, dropout_seed
from finetune_trainer.data.examples import Example
from finetune_trainer.engine.checks import check_model
from finetune_trainer.loss.dropout import keep_mask
from finetune_trainer.loss.head import LossHead
from finetune_trainer.loss.objective import Objective
from finetune_trainer.model.adapters import add_adapters
from finetune_trainer.model.attention import IMPLEMENTATIONS, Kernel
from finetune_trainer.model.load import enable_gradient_checkpointing, trained_parameters

TARGETS = ["q_proj", "v_proj", "down_proj", "embed_tokens", "lm_head"]
FIRST = Example((4, 9, 17, 25, 33, 41, 1), [(3, 7)])
SECOND = Example((5, 12, 19, 26, 1), [(2, 5)])


class OneProcess:
    """Takes the place of the engine: has the methods that `check_model` calls, for a model in one process without
    sharding."""

    device = torch.device("cpu")

    def __init__(self, model: Any, forward: Any = None) -> None:
        self.model, self.objective = model, Objective(model)
        self.forward = forward or model

    def train(self, mode: bool = True) -> None:
        self.model.train(mode)

    def loss(self, batch: Batch, *, full_logits: bool = False) -> torch.Tensor:
        return self.objective.loss(self.forward, batch, full_logits=full_logits)

    def logits(self, batch: Batch) -> torch.Tensor:
        return self.objective.logits(self.forward, batch)

    def use_attention(self, kernel: Kernel) -> None:
        inner = self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model
        inner.set_attn_implementation(IMPLEMENTATIONS[kernel])

    def use_full_logits(self) -> None:
        self.objective.full_logits = True


def model_of(folder: Path, *, attention: str = "sdpa", dropout: str = "0", recompute: bool = False) -> Any:
    """Return a tiny model with non-zero adapters."""
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation=attention)
    base.config.use_cache = False
    base.lm_head.weight = nn.Parameter(base.lm_head.weight.detach().clone())
    base.config.tie_word_embeddings = False
    if recompute:
        enable_gradient_checkpointing(base)
    model = add_adapters(base, LoRASpec(rank=4, alpha=8, dropout=dropout), targets=TARGETS, seed=1, base_name="tiny")
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in trained_parameters(model).values():
            parameter.normal_(0, 0.1, generator=generator)
    return model.train()


def batch_of(*sequences: list[Example], packed: bool = False) -> Batch:
    numbers = {id(FIRST): 1, id(SECOND): 2}
    keyed = [[(example, dropout_seed(7, 3, numbers[id(example)])) for example in line] for line in sequences]
    return collate(keyed, pad=1, packed=packed)


def checked(engine: OneProcess, *, packing: bool, kernel: Kernel = Kernel.SDPA) -> None:
    check_model(engine, [FIRST, SECOND], pad=1, packing=packing, kernels=[kernel])  # type: ignore[arg-type]


def gradients(engine: OneProcess, batch: Batch) -> dict[str, torch.Tensor]:
    engine.model.zero_grad()
    engine.loss(batch).backward()
    return {name: parameter.grad.clone() for name, parameter in trained_parameters(engine.model).items()}


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_trap_9_packing_contamination(attention: str, training: bool, tiny_model: Path) -> None:
    engine = OneProcess(model_of(tiny_model, attention=attention, dropout="0.1"))
    engine.train(training)
    with torch.no_grad():
        alone = engine.logits(batch_of([SECOND]))
        packed = engine.logits(batch_of([FIRST, SECOND], packed=True))[-len(alone) :]
        joined = Example((*FIRST.ids, *SECOND.ids), [(len(FIRST.ids) + 2, len(FIRST.ids) + 5)])
        contaminated = engine.logits(collate([[(joined, 1)]], pad=1, packed=False))
    torch.testing.assert_close(packed, alone, rtol=0, atol=1e-5)
    assert float((contaminated - alone).abs().max()) > 0.05
    checked(engine, packing=True, kernel=Kernel.SDPA if attention == "sdpa" else Kernel.EAGER)
    assert not engine.objective.full_logits


def test_a_backend_that_leaks_is_refused(tiny_model: Path) -> None:
    """The model's forward function adds to the logits of each token those of all tokens before it, as a layer that
    carries a state from token to token does."""
    model = model_of(tiny_model)

    def leaking(**inputs: Any) -> Any:
        outputs = model(**inputs)
        if outputs.logits.ndim == 3:
            outputs.logits = outputs.logits.cumsum(1)
        return outputs

    with pytest.raises(UserError, match=r"^dataset.packing: must be false for this model: its attention lets packed"):
        checked(OneProcess(model, leaking), packing=True)
    checked(OneProcess(model, leaking), packing=False)


def test_a_model_that_changes_logits_after_its_head_gets_its_loss_from_whole_logits(tiny_model: Path) -> None:
    model = model_of(tiny_model)

    def capped(**inputs: Any) -> Any:
        outputs = model(**inputs)
        outputs.logits = 3 * torch.tanh(outputs.logits / 3)
        return outputs

    engine = OneProcess(model, capped)
    checked(engine, packing=False)
    assert engine.objective.full_logits
    batch = batch_of([FIRST])
    logits = 3 * torch.tanh(model(input_ids=batch.input_ids).logits[0, 2:6] / 3)
    wanted = nn.functional.cross_entropy(logits, batch.targets, reduction="sum")
    assert float(engine.loss(batch).detach()) == pytest.approx(float(wanted.detach()), rel=1e-6)


def test_packed_and_padded_examples_have_the_same_loss_gradient_and_dropout(tiny_model: Path) -> None:
    engine = OneProcess(model_of(tiny_model, dropout="0.3"))
    padded, packed = batch_of([FIRST], [SECOND]), batch_of([FIRST, SECOND], packed=True)
    assert float(engine.loss(padded).detach()) == pytest.approx(float(engine.loss(packed).detach()), rel=1e-6)
    wanted = gradients(engine, padded)
    for name, gradient in gradients(engine, packed).items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-4, atol=1e-6, msg=name)


def test_trap_12_checkpointing_without_input_grads(tiny_model: Path) -> None:
    batch = batch_of([FIRST], [SECOND])
    wanted = gradients(OneProcess(model_of(tiny_model, dropout="0.3")), batch)
    found = gradients(OneProcess(model_of(tiny_model, dropout="0.3", recompute=True)), batch)
    assert found.keys() == wanted.keys()
    for name, gradient in found.items():
        assert gradient.abs().sum() > 0, name
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-5, atol=1e-7, msg=name)


def test_a_loss_in_chunks_is_the_loss_and_keeps_the_logits_of_one_chunk_only(tiny_model: Path) -> None:
    batch = batch_of([FIRST], [SECOND])
    wanted = gradients(OneProcess(model_of(tiny_model, dropout="0.3")), batch)
    model = model_of(tiny_model, dropout="0.3")
    engine = OneProcess(model)
    head: LossHead = engine.objective._head  # type: ignore[assignment]  # its size is no option of the objective
    head._chunk_rows = 2
    largest = 0
    logits = head._logits

    def counted(hidden: torch.Tensor) -> torch.Tensor:
        nonlocal largest
        largest = max(largest, len(hidden))
        return logits(hidden)

    head._logits = counted
    for name, gradient in gradients(engine, batch).items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-4, atol=1e-6, msg=name)
    assert largest == 2


def test_dropout_is_a_function_of_token_layer_and_feature() -> None:
    keys = batch_of([FIRST, SECOND], packed=True).dropout_keys
    mask = keep_mask(keys, 4096, 0.25)
    assert float(mask.float().mean()) == pytest.approx(0.75, abs=0.01)
    assert float(mask.float().mean(dim=-1).std()) < 0.02
    assert torch.equal(mask, keep_mask(keys, 4096, 0.25))
    other = keep_mask(keys ^ 12345, 4096, 0.25)
    agreement = float((mask == other).float().mean())
    assert agreement == pytest.approx(0.75**2 + 0.25**2, abs=0.02)
    assert keep_mask(torch.tensor([0, 1, -1, 1 << 40]), 8, 0.5).int().tolist() == [
        [0, 0, 0, 0, 1, 1, 1, 1],
        [0, 0, 1, 1, 0, 0, 0, 1],
        [0, 0, 0, 0, 1, 1, 1, 1],
        [0, 1, 0, 1, 0, 0, 0, 0],
    ], "the masks of a run must not change with a version of torch"
