"""The computed FLOPs per token equal known figures for models of the sizes of Llama 2 and Llama 3. One of the known
figures was printed by NVIDIA's NeMo."""

from __future__ import annotations

import pytest

from finetune_core.planning.flops import ModelShape, forward_flops, peak_flops, training_flops, utilisation
from finetune_core.planning.gpu_types import GPU_TYPES, GpuType

GIGA = 1e9
LLAMA: dict[str, tuple[int, int, float, float]] = {
    # By model: number of layers, width, number of all parameters, number of parameters of the input embedding.
    "7B": (32, 4096, 6_738_415_616, 32_000 * 4096),
    "13B": (40, 5120, 13_015_864_320, 32_000 * 5120),
    "70B": (80, 8192, 68_976_648_192, 32_000 * 8192),
    "Llama 3 8B": (32, 4096, 8_030_261_248, 128_256 * 4096),
}
ADAPTERS = {"7B": 19_988_480, "13B": 31_293_440, "70B": 103_546_880, "Llama 3 8B": 20_971_520}


def shape(name: str, *, adapters: bool) -> ModelShape:
    layers, width, parameters, embedding = LLAMA[name]
    matrices = int(parameters - embedding)
    trained = ADAPTERS[name] if adapters else matrices
    return ModelShape(
        layers=layers,
        attention_width=width,
        matrix_parameters=matrices,
        trained_parameters=trained,
        adapters=adapters,
    )


def per_token(name: str, length: int, *, adapters: bool) -> float:
    return training_flops(shape(name, adapters=adapters), length, length * length) / length


@pytest.mark.parametrize(
    ("name", "length", "adapters", "giga"),
    [
        ("7B", 512, True, 26.7),
        ("7B", 2048, True, 27.5),
        ("7B", 4096, True, 28.6),
        ("7B", 512, False, 40.1),
        ("7B", 2048, False, 41.3),
        ("7B", 4096, False, 42.9),
        ("13B", 512, True, 51.8),
        ("70B", 512, True, 276),
    ],
)
def test_flops_of_a_token(name: str, length: int, adapters: bool, giga: float) -> None:
    assert per_token(name, length, adapters=adapters) / GIGA == pytest.approx(giga, rel=0.0025)


def test_a_published_rate_gives_the_published_flops() -> None:
    """NVIDIA's NeMo prints both figures for Llama 3 8B with LoRA and sequences of 4,096 tokens: a rate of 12,472.87
    tokens per second, and 402 TFLOP per second."""
    assert 12_472.87 * per_token("Llama 3 8B", 4096, adapters=True) / 1e12 == pytest.approx(402, rel=0.003)


def test_recomputation_is_a_forward_pass_and_no_model_flops() -> None:
    """With LoRA a 70B model needs 276 GFLOPs a token. If the hardware computes the forward pass a second time during
    the backward pass, to save memory, the hardware executes 414 GFLOPs. The second forward pass does not count as work
    of the model."""
    again = forward_flops(shape("70B", adapters=True), 512, 512 * 512) / 512
    assert (per_token("70B", 512, adapters=True) + again) / GIGA == pytest.approx(414, rel=0.0025)


def test_trap_27_padding_is_no_work_and_lora_saves_at_most_a_third() -> None:
    """Four sequences of 100 tokens are padded to 200 positions each. Padding is not counted as work, so the utilisation
    is half of that of four sequences with 200 tokens."""
    small = shape("7B", adapters=True)
    real = training_flops(small, 4 * 100, 4 * 100**2)
    full_length = training_flops(small, 4 * 200, 4 * 200**2)
    assert real / full_length == pytest.approx(0.5, abs=0.01)
    peak = peak_flops("NVIDIA H100 80GB HBM3")
    assert peak == 989.4e12
    half, whole = utilisation(real, 1.0, 8, peak), utilisation(full_length, 1.0, 8, peak)
    assert half is not None
    assert whole is not None
    assert whole / half == pytest.approx(2.0, abs=0.03)
    ratio = per_token("7B", 512, adapters=False) / per_token("7B", 512, adapters=True)
    assert 1.49 < ratio < 1.5


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A10G", 70e12),
        ("NVIDIA A10", 125e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989.4e12),
        ("NVIDIA RTX A1000", None),
        ("cpu", None),
    ],
)
def test_peak_by_name(name: str, peak: float | None) -> None:
    assert peak_flops(name) == peak
    assert utilisation(1e12, 1.0, 1, peak) == (None if peak is None else 1e12 / peak)


@pytest.mark.parametrize("gpu", [gpu for gpu in GPU_TYPES if gpu.bf16], ids=lambda gpu: str(gpu.name))
def test_the_meter_knows_the_peak_of_each_type_that_a_plan_can_be_made_for(gpu: GpuType) -> None:
    """torch's names of devices are the products of the node's label with spaces."""
    assert {peak_flops(product.replace("-", " ")) for product in gpu.products} == {gpu.tera_flops * 1e12}
