"""Loading a model: incomplete files are named in the error, and under ZeRO-3 a rank never holds the whole model, but
only its shard and the pages of one weight file.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from finetune_core.errors import UserError
from finetune_trainer.model.load import load_base
from finetune_trainer.model.weight_files import check_complete
from tests.trainer import tiny
from tests.trainer.objectstore import free_port

MIB = 1 << 20
RANKS = 2


def load(folder: Path, scratch: Path, stage: int) -> list[dict[str, int]]:
    """Load the model in ``folder`` on two ranks, and return the memory figures that each rank printed (see
    `loading.py`)."""
    port, ranks = free_port(), []
    for rank in range(RANKS):
        environment = {
            **os.environ,
            "PATH": "/nonexistent",
            "OMP_NUM_THREADS": "1",
            "GLOO_SOCKET_IFNAME": "lo",
            "DS_ACCELERATOR": "cpu",
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(RANKS),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        command = [sys.executable, "-m", "tests.trainer.loading", str(folder), str(stage), str(scratch)]
        ranks.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE))
    outputs = [process.communicate(timeout=300) for process in ranks]
    assert [process.returncode for process in ranks] == [0] * RANKS, outputs
    return [json.loads(output.splitlines()[-1]) for output, _ in outputs]


def test_a_weights_file_that_is_missing_or_cut_short_is_named(tmp_path: Path) -> None:
    folder = tiny.write_model(tmp_path / "model", files="60KB")
    check_complete(folder)
    files = sorted(folder.glob("*.safetensors"))
    whole = files[1].read_bytes()
    files[1].write_bytes(whole[:-1])
    with pytest.raises(UserError, match=rf"^model: its files are incomplete: {files[1].name} \("):
        check_complete(folder)
    files[1].unlink()
    with pytest.raises(UserError, match=rf"names {files[1].name}, which is not there$"):
        check_complete(folder)


def test_a_model_that_lacks_a_weight_is_refused_and_not_made_up(tmp_path: Path) -> None:
    folder = tiny.write_model(tmp_path / "model", tied=False)
    path = folder / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(UserError, match=r"lack 1 weights, such as model.layers.1.mlp.up_proj.weight$"):
        load_base(folder, torch.float32)


@pytest.mark.long
def test_a_node_holds_its_shard_and_a_weight_file_a_rank_while_it_loads(tmp_path: Path) -> None:
    """The model has 120 million parameters in eight files.

    Beside its shards and one weight file per rank, a node may use 4 GiB for a model of any size. This model is small,
    so the test allows only 256 MiB per rank.
    """
    torch.set_default_dtype(torch.bfloat16)
    try:
        folder = tiny.write_model(
            tmp_path / "model",
            tied=False,
            files="32MB",
            vocab_size=16000,
            hidden_size=1024,
            intermediate_size=2816,
            num_hidden_layers=7,
            num_attention_heads=16,
            num_key_value_heads=16,
        )
    finally:
        torch.set_default_dtype(torch.float32)
    sizes = [path.stat().st_size for path in folder.glob("*.safetensors")]
    model, largest = sum(sizes), max(sizes)
    assert len(sizes) >= 6
    ranks = load(folder, tmp_path, 3)
    print(f"model {model / MIB:.0f} MiB in {len(sizes)} files, largest {largest / MIB:.0f} MiB")
    for rank in ranks:
        print({name: f"{value / MIB:.0f} MiB" for name, value in rank.items()})
    assert sum(rank["held"] for rank in ranks) < 1.05 * model
    assert sum(rank["peak"] for rank in ranks) < model + RANKS * (largest + 256 * MIB)
    whole = load(folder, tmp_path, 2)
    print(f"at stage 2 both ranks hold {sum(rank['held'] for rank in whole) / MIB:.0f} MiB")
    assert sum(rank["held"] for rank in whole) > 1.9 * model
