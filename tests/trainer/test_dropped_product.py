"""The products with a dropped input use the masks of `loss/dropout.py`. The CUDA kernels are compiled for each GPU
architecture, and their source is run on the CPU, where it computes the same values as the reference in plain torch.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils import cpp_extension

from finetune_trainer.kernels import dropped_product
from finetune_trainer.kernels import dropped_product_cuda as cuda
from finetune_trainer.kernels.dropped_product import (
    Dropout,
    dropped_gradient_of_a,
    dropped_inner,
    dropped_input_gradient,
)
from finetune_trainer.loss.dropout import keep_mask

ARCHITECTURES = ("75", "80", "86", "90", "100", "120")
"""The compute capabilities for which torch's wheel has kernels."""

HOST = r"""
#include <barrier>
#include <cstring>
#include <thread>
#include <vector>
struct Place { int x, y, z; };
static thread_local Place threadIdx, blockIdx;
static std::barrier<>* meeting;
#define __global__
#define __device__
#define __shared__ static
#define __syncthreads() meeting->arrive_and_wait()
static inline float __uint_as_float(unsigned bits) { float value; memcpy(&value, &bits, 4); return value; }
static inline unsigned __float_as_uint(float value) { unsigned bits; memcpy(&bits, &value, 4); return bits; }
"""
"""What the source of the kernels needs of CUDA, for a C++ compiler: a thread for each thread of a block, and one block
after the other."""

LAUNCH = r"""
template <typename Kernel> static void launch(int x, int y, int z, Kernel kernel) {
  std::barrier<> all(THREADS);
  meeting = &all;
  std::vector<std::thread> threads;
  for (int number = 0; number < THREADS; number++)
    threads.emplace_back([=, &all] {
      for (int block = 0; block < x * y * z; block++) {
        threadIdx = {number, 0, 0};
        blockIdx = {block % x, block / x % y, block / (x * y)};
        kernel();
        all.arrive_and_wait();
      }
    });
  for (auto& thread : threads) thread.join();
}
extern "C" void run_dropped_inner(int x, int y, int z, const VALUE* a, const i64* b, const VALUE* c, const i64* d,
    const int* e, VALUE* f, int g, int h, int i, int j, double k) {
  launch(x, y, z, [=] { dropped_inner(a, b, c, d, e, f, g, h, i, j, k); });
}
extern "C" void run_dropped_gradient_of_a(int x, int y, int z, const VALUE* a, const VALUE* b, const i64* c,
    const i64* d, const int* e, float* f, int g, int h, int i, int j, double k, int l) {
  launch(x, y, z, [=] { dropped_gradient_of_a(a, b, c, d, e, f, g, h, i, j, k, l); });
}
extern "C" void run_dropped_input_gradient(int x, int y, int z, const VALUE* a, const i64* b, const VALUE* c,
    const i64* d, const int* e, VALUE* f, int g, int h, int i, int j, int k, double l) {
  launch(x, y, z, [=] { dropped_input_gradient(a, b, c, d, e, f, g, h, i, j, k, l); });
}
"""


class HostKernel:
    """A kernel that runs on the CPU, with the call of a kernel of `torch.cuda`."""

    def __init__(self, library: ctypes.CDLL, name: str) -> None:
        self.function = getattr(library, f"run_{name}")

    def __call__(self, grid: Sequence[int], block: Sequence[int], arguments: Sequence[Any]) -> None:
        assert tuple(block) == (cuda.THREADS, 1, 1)
        kinds: dict[type, Any] = {int: ctypes.c_int, float: ctypes.c_double}
        self.function(
            *map(ctypes.c_int, grid),
            *(
                ctypes.c_void_p(value.data_ptr()) if isinstance(value, torch.Tensor) else kinds[type(value)](value)
                for value in arguments
            ),
        )


@pytest.fixture(params=list(cuda.VALUES), ids=["fp32", "bf16"])
def dtype(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> torch.dtype:
    """Let the launchers of the kernels run the kernels' source on the CPU, for one type of tensors."""
    compiler = shutil.which("g++")
    if compiler is None:
        # The source of the kernels is CUDA, which is compiled for the CPU here. The trainer itself needs no compiler.
        pytest.skip("no C++ compiler on this machine")
    found: torch.dtype = request.param
    code, binary = tmp_path / "kernels.cpp", tmp_path / "kernels.so"
    code.write_text(HOST + cuda.source_for(found) + LAUNCH)
    subprocess.run(
        [
            compiler,
            "-std=c++20",
            "-O1",
            "-ffp-contract=off",
            "-pthread",
            "-shared",
            "-fPIC",
            str(code),
            "-o",
            str(binary),
        ],
        check=True,
    )
    library = ctypes.CDLL(str(binary))
    monkeypatch.setattr(cuda, "_kernel", lambda name, _dtype, _device: HostKernel(library, name))
    return found


def inputs(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Dropout]:
    """Return x (T, I), a gradient (T, R), the matrices A (R, I) and the dropout of three adapters of unequal ranks. No
    size is a multiple of a block's."""
    generator = torch.Generator().manual_seed(5)
    ranks = (8, 3, 17)
    tokens, features = 21, 150
    x, gradient, a = (
        torch.randn(shape, generator=generator).to(dtype)
        for shape in ((tokens, features), (tokens, sum(ranks)), (sum(ranks), features))
    )
    keys = torch.randint(-(1 << 63), (1 << 63) - 1, (tokens,), generator=generator)
    return x, gradient, a, Dropout(keys, 0.3, (1 << 40, -7, 12345), ranks)


def test_the_products_are_those_of_a_dropped_input() -> None:
    x, gradient, a, dropout = inputs(torch.float32)
    rows = torch.tensor([adapter for adapter, rank in enumerate(dropout.ranks) for _ in range(rank)])
    kept = torch.stack([keep_mask(dropout.keys ^ salt, x.shape[1], dropout.p) for salt in dropout.salts])
    dropped = torch.where(kept, x / 0.7, 0.0)
    assert 0.2 < float((dropped == 0).float().mean()) < 0.4
    inner = torch.stack([dropped[adapter] @ a[row] for row, adapter in enumerate(rows)], dim=1)
    torch.testing.assert_close(dropped_inner(x, a, dropout), inner, rtol=1e-6, atol=1e-5)
    of_a = torch.stack([gradient[:, row] @ dropped[adapter] for row, adapter in enumerate(rows)])
    torch.testing.assert_close(dropped_gradient_of_a(gradient, x, dropout), of_a, rtol=1e-6, atol=1e-5)
    of_x = torch.stack([gradient[:, row, None] * a[row] * kept[adapter] / 0.7 for row, adapter in enumerate(rows)])
    torch.testing.assert_close(dropped_input_gradient(gradient, a, dropout), of_x.sum(0), rtol=1e-6, atol=1e-5)


def test_the_source_of_the_cuda_kernels_computes_what_plain_torch_computes(dtype: torch.dtype) -> None:
    x, gradient, a, dropout = inputs(dtype)
    wide = dropout.keys, dropout.salts, dropout.ranks, dropout.p
    keys, salts, ranks, p = wide
    # The kernels round once at the end; plain torch in bf16 would round in between.
    near = {"rtol": 1e-5, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 2**-8, "atol": 1e-3}
    found = cuda.dropped_inner(x, keys, a, salts, ranks, p)
    assert found.dtype == dtype
    torch.testing.assert_close(found.float(), dropped_inner(x.float(), a.float(), dropout), **near)
    found = cuda.dropped_gradient_of_a(gradient, x, keys, salts, ranks, p)
    torch.testing.assert_close(found.float(), dropped_gradient_of_a(gradient.float(), x.float(), dropout), **near)
    found = cuda.dropped_input_gradient(gradient, keys, a, salts, ranks, p)
    torch.testing.assert_close(found.float(), dropped_input_gradient(gradient.float(), a.float(), dropout), **near)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("value", list(cuda.VALUES), ids=["fp32", "bf16"])
def test_nvrtc_compiles_the_kernels(value: torch.dtype, architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.cuda._utils import _nvrtc_compile

    if torch.version.cuda is None:
        pytest.skip("this torch has no NVRTC")
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", "/usr/local/cuda")
    # One call compiles all kernels of the source.
    binary, found = _nvrtc_compile(cuda.source_for(value), "dropped_inner", compute_capability=architecture)
    assert found == "dropped_inner"
    for name in (b"dropped_inner", b"dropped_gradient_of_a", b"dropped_input_gradient"):
        assert name in binary


def test_without_tokens_no_kernel_is_started() -> None:
    """CUDA refuses a kernel without blocks."""
    chosen = dropped_product._on_cuda(lambda *_: "kernel", lambda *_: "plain")
    assert [chosen(torch.zeros(tokens, 16)) for tokens in (0, 1)] == ["plain", "kernel"]
    assert chosen(torch.zeros(1, 16, dtype=torch.float64)) == "plain"
    dropout = Dropout(torch.zeros(0, dtype=torch.int64), 0.5, (3,), (2,))
    assert dropped_inner(torch.zeros(0, 16), torch.zeros(2, 16), dropout).shape == (0, 2)
    assert not dropped_gradient_of_a(torch.zeros(0, 2), torch.zeros(0, 16), dropout).any()
    assert dropped_input_gradient(torch.zeros(0, 2), torch.zeros(2, 16), dropout).shape == (0, 16)
