"""A worker imports bitsandbytes only for a job that quantizes its base model."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from finetune_core.contract import RunConfig
from tests.trainer.objectstore import ObjectStore
from tests.trainer.pods import run_config

PROGRAM = """
import sys
from finetune_core.contract import RunConfig
from finetune_trainer.pod.imports import importing
from finetune_trainer.pod.unused_libraries import leave_out_bitsandbytes
leave_out_bitsandbytes(RunConfig.model_validate_json(sys.stdin.read()))
with importing():
    import peft
print(sys.modules.get("bitsandbytes") is not None)
"""


@pytest.mark.parametrize(
    ("lora", "imported"),
    [({"quantization": "NF4"}, True), ({}, False), pytest.param(None, False, marks=pytest.mark.long)],
)
def test_bitsandbytes_is_imported_only_where_the_base_model_is_quantized(
    store: ObjectStore, lora: dict[str, Any] | None, imported: bool
) -> None:
    config = run_config(store, "unused", lora=lora, method="Full" if lora is None else "LoRA")
    RunConfig.model_validate(config)
    command = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(command, input=json.dumps(config), capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(imported)]
