"""The three operators of `dropped_product.py` as CUDA kernels, which NVRTC compiles when a training begins. NVRTC is
part of torch's packages, so no compiler is needed in the image.

`tests/trainer/test_dropped_product.py` compiles the source with NVRTC for each GPU architecture that the trainer
supports, and runs the same source on the CPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch

THREADS = 128
"""Threads of a block."""
TOKENS = 8
"""Tokens that a block computes at a time, so that a value of a matrix A that was read is used for several tokens."""
RANKS = 8
"""Rows of the matrices A that a thread computes at a time."""
SLICES = 16
"""Number of parts into which the tokens are divided for the gradient of A, so that there are enough blocks."""
VALUES = {torch.float32: "float", torch.bfloat16: "unsigned short"}
"""The types of tensors that the kernels take, and how C sees them."""

SOURCE = f"""
#define THREADS {THREADS}
#define TOKENS {TOKENS}
#define RANKS {RANKS}
typedef unsigned int u32;
typedef long long i64;

__device__ inline float widen(float value) {{ return value; }}
__device__ inline float widen(unsigned short bits) {{ return __uint_as_float((u32)bits << 16); }}
__device__ inline void narrow(float value, float* to) {{ *to = value; }}
// Rounds to the nearest bfloat16, ties to even.
__device__ inline void narrow(float value, unsigned short* to) {{
  u32 bits = __float_as_uint(value);
  *to = value != value ? 0x7FC0 : (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
}}

// The same hash as keep_mask in loss/dropout.py.
__device__ inline u32 mix(u32 value) {{
  value ^= value >> 16;
  value *= 0x85EBCA6Bu;
  value ^= value >> 13;
  value *= 0xC2B2AE35u;
  return value ^ (value >> 16);
}}
__device__ inline u32 hash_of(i64 key, i64 salt) {{
  i64 salted = key ^ salt;
  return mix((u32)(salted ^ (salted >> 32)));
}}
__device__ inline bool kept(u32 hash, int feature, u32 threshold) {{
  return (mix(hash ^ ((u32)feature * 0x9E3779B9u)) & 0x7FFFFFFFu) >= threshold;
}}

// Grid: (number of chunks, tokens / TOKENS). A chunk is (adapter, first row of A, number of rows).
extern "C" __global__ void dropped_inner(
    const VALUE* x, const i64* keys, const VALUE* a, const i64* salts, const int* chunks, VALUE* inner,
    int tokens, int features, int rows, int threshold, double scale) {{
  __shared__ float sums[TOKENS * RANKS][THREADS + 1];
  const int thread = threadIdx.x, first = blockIdx.y * TOKENS;
  const int adapter = chunks[3 * blockIdx.x], row = chunks[3 * blockIdx.x + 1], count = chunks[3 * blockIdx.x + 2];
  u32 hashes[TOKENS];
  float total[TOKENS][RANKS];
  for (int t = 0; t < TOKENS; t++) {{
    hashes[t] = first + t < tokens ? hash_of(keys[first + t], salts[adapter]) : 0;
    for (int r = 0; r < RANKS; r++) total[t][r] = 0;
  }}
  for (int i = thread; i < features; i += THREADS) {{
    float weights[RANKS];
    for (int r = 0; r < RANKS; r++) weights[r] = r < count ? widen(a[(i64)(row + r) * features + i]) : 0;
    for (int t = 0; t < TOKENS; t++) {{
      if (first + t < tokens && kept(hashes[t], i, threshold)) {{
        const float value = widen(x[(i64)(first + t) * features + i]);
        for (int r = 0; r < RANKS; r++) total[t][r] += value * weights[r];
      }}
    }}
  }}
  for (int t = 0; t < TOKENS; t++)
    for (int r = 0; r < RANKS; r++) sums[t * RANKS + r][thread] = total[t][r];
  __syncthreads();
  // Two threads add up the THREADS sums of one product.
  const int product = thread / 2, part = thread % 2 * (THREADS / 2);
  float sum = 0;
  if (product < TOKENS * RANKS)
    for (int j = 0; j < THREADS / 2; j++) sum += sums[product][part + j];
  __syncthreads();
  if (product < TOKENS * RANKS) sums[product][thread % 2] = sum;
  __syncthreads();
  if (thread < TOKENS * RANKS) {{
    const int token = first + thread / RANKS, r = thread % RANKS;
    if (token < tokens && r < count)
      narrow((sums[thread][0] + sums[thread][1]) * (float)scale, &inner[(i64)token * rows + row + r]);
  }}
}}

// Grid: (features / THREADS, number of chunks, number of slices). The sum over the slices is the gradient of A.
extern "C" __global__ void dropped_gradient_of_a(
    const VALUE* gradient, const VALUE* x, const i64* keys, const i64* salts, const int* chunks, float* partial,
    int tokens, int features, int rows, int threshold, double scale, int slice) {{
  const int i = blockIdx.x * THREADS + threadIdx.x;
  if (i >= features) return;
  const int adapter = chunks[3 * blockIdx.y], row = chunks[3 * blockIdx.y + 1], count = chunks[3 * blockIdx.y + 2];
  const int begin = blockIdx.z * slice, end = begin + slice < tokens ? begin + slice : tokens;
  float total[RANKS];
  for (int r = 0; r < RANKS; r++) total[r] = 0;
  for (int t = begin; t < end; t++) {{
    if (!kept(hash_of(keys[t], salts[adapter]), i, threshold)) continue;
    const float value = widen(x[(i64)t * features + i]);
    for (int r = 0; r < count; r++) total[r] += value * widen(gradient[(i64)t * rows + row + r]);
  }}
  for (int r = 0; r < count; r++)
    partial[((i64)blockIdx.z * rows + row + r) * features + i] = total[r] * (float)scale;
}}

// Grid: (features / THREADS, tokens / TOKENS). The rows of adapter g are those from bounds[g] to bounds[g + 1].
extern "C" __global__ void dropped_input_gradient(
    const VALUE* gradient, const i64* keys, const VALUE* a, const i64* salts, const int* bounds, VALUE* found,
    int tokens, int features, int rows, int adapters, int threshold, double scale) {{
  const int i = blockIdx.x * THREADS + threadIdx.x, first = blockIdx.y * TOKENS;
  if (i >= features) return;
  float sums[TOKENS];
  for (int t = 0; t < TOKENS; t++) sums[t] = 0;
  for (int g = 0; g < adapters; g++) {{
    float products[TOKENS];
    for (int t = 0; t < TOKENS; t++) products[t] = 0;
    for (int row = bounds[g]; row < bounds[g + 1]; row++) {{
      const float weight = widen(a[(i64)row * features + i]);
      for (int t = 0; t < TOKENS; t++)
        if (first + t < tokens) products[t] += widen(gradient[(i64)(first + t) * rows + row]) * weight;
    }}
    for (int t = 0; t < TOKENS; t++)
      if (first + t < tokens && kept(hash_of(keys[first + t], salts[g]), i, threshold)) sums[t] += products[t];
  }}
  for (int t = 0; t < TOKENS; t++)
    if (first + t < tokens) narrow(sums[t] * (float)scale, &found[(i64)(first + t) * features + i]);
}}
"""


def source_for(dtype: torch.dtype) -> str:
    """Return the source of the kernels for tensors of ``dtype``, a key of VALUES."""
    return f"#define VALUE {VALUES[dtype]}\n{SOURCE}"


@cache
def _kernel(name: str, dtype: torch.dtype, _device: int) -> Any:
    """Return the kernel ``name`` for tensors of ``dtype``. A compiled kernel belongs to one GPU."""
    from torch.utils import cpp_extension

    if cpp_extension.CUDA_HOME is None:
        # `_compile_kernel` wants to know the folder of CUDA's headers. The kernels include none, and images have none.
        cpp_extension.CUDA_HOME = "/usr/local/cuda"
    return torch.cuda._compile_kernel(source_for(dtype), name)


def threshold_of(p: float) -> int:
    """Return the bound below which a hash of 31 bits means that a feature is dropped with probability ``p``."""
    return round(p * 0x80000000)


def chunks_of(ranks: Sequence[int]) -> list[int]:
    """Return (adapter, first row, number of rows) for each chunk of at most RANKS rows, one after the other. A chunk
    has rows of one adapter only."""
    chunks: list[int] = []
    start = 0
    for adapter, rank in enumerate(ranks):
        for row in range(0, rank, RANKS):
            chunks += adapter, start + row, min(RANKS, rank - row)
        start += rank
    return chunks


def bounds_of(ranks: Sequence[int]) -> list[int]:
    """Return the first row of each adapter, and the number of all rows."""
    return [sum(ranks[:number]) for number in range(len(ranks) + 1)]


@cache
def _table(values: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Return ``values`` on ``device``. The few tables of a model are copied once, because a copy waits for the GPU."""
    return torch.tensor(values, dtype=dtype, device=device)


def _tables(salts: Sequence[int], rows: Sequence[int], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    return _table(tuple(salts), torch.int64, device), _table(tuple(rows), torch.int32, device)


def dropped_inner(
    x: torch.Tensor, keys: torch.Tensor, a: torch.Tensor, salts: Sequence[int], ranks: Sequence[int], p: float
) -> torch.Tensor:
    """Return the products (T, R) of the dropped ``x`` (T, I) with the rows of ``a`` (R, I)."""
    (tokens, features), rows, chunks = x.shape, len(a), chunks_of(ranks)
    inner = torch.empty((tokens, rows), dtype=x.dtype, device=x.device)
    salt_table, chunk_table = _tables(salts, chunks, x.device)
    _kernel("dropped_inner", x.dtype, x.device.index)(
        (len(chunks) // 3, -(-tokens // TOKENS), 1),
        (THREADS, 1, 1),
        [
            *(x.contiguous(), keys.contiguous(), a.contiguous(), salt_table, chunk_table, inner),
            *(tokens, features, rows, threshold_of(p), 1 / (1 - p)),
        ],
    )
    return inner


def dropped_gradient_of_a(
    gradient: torch.Tensor,
    x: torch.Tensor,
    keys: torch.Tensor,
    salts: Sequence[int],
    ranks: Sequence[int],
    p: float,
) -> torch.Tensor:
    """Return the gradient (R, I) of the matrices A, where ``gradient`` (T, R) is that of `dropped_inner`."""
    (tokens, features), rows, chunks = x.shape, gradient.shape[1], chunks_of(ranks)
    per_slice = -(-tokens // SLICES)
    slices = -(-tokens // per_slice)
    partial = torch.empty((slices, rows, features), dtype=torch.float32, device=x.device)
    salt_table, chunk_table = _tables(salts, chunks, x.device)
    _kernel("dropped_gradient_of_a", x.dtype, x.device.index)(
        (-(-features // THREADS), len(chunks) // 3, slices),
        (THREADS, 1, 1),
        [
            *(gradient.contiguous(), x.contiguous(), keys.contiguous(), salt_table, chunk_table, partial),
            *(tokens, features, rows, threshold_of(p), 1 / (1 - p), per_slice),
        ],
    )
    return partial.sum(0).to(x.dtype)


def dropped_input_gradient(
    gradient: torch.Tensor, keys: torch.Tensor, a: torch.Tensor, salts: Sequence[int], ranks: Sequence[int], p: float
) -> torch.Tensor:
    """Return the gradient (T, I) of x, where ``gradient`` (T, R) is that of `dropped_inner`."""
    tokens, (rows, features) = len(gradient), a.shape
    found = torch.empty((tokens, features), dtype=a.dtype, device=a.device)
    salt_table, bounds = _tables(salts, bounds_of(ranks), a.device)
    _kernel("dropped_input_gradient", a.dtype, a.device.index)(
        (-(-features // THREADS), -(-tokens // TOKENS), 1),
        (THREADS, 1, 1),
        [
            *(gradient.contiguous(), keys.contiguous(), a.contiguous(), salt_table, bounds, found),
            *(tokens, features, rows, len(ranks), threshold_of(p), 1 / (1 - p)),
        ],
    )
    return found
