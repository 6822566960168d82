"""A user leaves kernels plain with a variable of the environment, and a wrong name ends with one sentence."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from finetune_core.errors import UserError
from finetune_trainer.engine.plain_engine import PlainEngine
from finetune_trainer.kernels.parts import PLAIN_KERNELS_VARIABLE, KernelPart, parts_left_plain
from tests.trainer.engine_runs import PLAIN, EngineRun, load, make_engine
from tests.trainer.objectstore import ObjectStore
from tests.trainer.pods import run_config, start_pods
from tests.trainer.preflights import paths_in, run_program

RUN = EngineRun(method="LoRA", parts=((PLAIN, 1),))
SENTENCE = (
    "podTemplate.env: FINETUNE_PLAIN_KERNELS: must name parts of Norms, Rotary, GatedProducts, Projections,"
    " GatedProjections, Dropout, HeadLoss, separated by commas: 'rope' is none of them"
)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("", set()),
        (" , ", set()),
        ("Rotary", {KernelPart.ROTARY}),
        ("norms, HEADLOSS,Rotary,", {KernelPart.NORMS, KernelPart.HEAD_LOSS, KernelPart.ROTARY}),
    ],
)
def test_the_variable_names_parts(text: str, parts: set[KernelPart]) -> None:
    assert parts_left_plain({PLAIN_KERNELS_VARIABLE: text, "Norms": "1"}) == parts
    assert parts_left_plain({}) == set()


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(UserError) as refused:
        parts_left_plain({PLAIN_KERNELS_VARIABLE: "Rotary,rope"})
    assert str(refused.value) == SENTENCE


@pytest.mark.parametrize("part", [KernelPart.ROTARY, KernelPart.HEAD_LOSS])
def test_an_engine_leaves_the_parts_plain(part: KernelPart, tiny_model: Path) -> None:
    def engine(*plain: KernelPart) -> PlainEngine:
        return PlainEngine(load(RUN, tiny_model), RUN.optimization(PLAIN), torch.device("cpu"), plain_kernels=plain)

    whole, without = engine(), engine(part)
    assert set(whole.kernels.replaced) - set(without.kernels.replaced) == {part} - {KernelPart.HEAD_LOSS}
    heads = [made._objective._head for made in (whole, without)]
    assert [head is not None and head._is_linear for head in heads] == [True, part is not KernelPart.HEAD_LOSS]


def test_the_log_says_what_trains_with_kernels(tiny_model: Path) -> None:
    engine = make_engine(RUN, PLAIN, load(RUN, tiny_model))
    assert engine.kernels.description == (
        "fused kernels: 5 Norms, 2 Rotary, 14 Projections, 2 GatedProjections, 2 GatedProducts"
    )


def test_the_launcher_and_the_preflight_check_read_the_variable_without_torch() -> None:
    code = (
        "import sys; from finetune_trainer.kernels.parts import parts_left_plain; parts_left_plain({});"
        " sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.gang
def test_a_wrong_name_ends_a_job_before_anything_is_fetched(store: ObjectStore, tmp_path: Path) -> None:
    config = run_config(store, "plain-parts", world__nodes=1)
    paths = paths_in(tmp_path, store)
    paths.run_file.write_text(json.dumps(config))
    wrong = {PLAIN_KERNELS_VARIABLE: "Rotary,rope"}
    checked = run_program(paths, **wrong)
    assert checked.code == 64
    assert SENTENCE in [finding.message for finding in checked.result.findings]
    attempt = start_pods(config, tmp_path / "pods", credentials=store.credentials, variables=wrong)
    assert attempt.wait() == [64]
    assert attempt.pods[0].result.message == SENTENCE
    assert "fetching" not in attempt.output
