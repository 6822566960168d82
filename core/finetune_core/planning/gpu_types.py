"""The types of GPUs that a plan can be made for: memory, arithmetic and bandwidths.

`GPU_TYPES` is the built-in table. `finetune plan --gpu-table FILE` adds types of a user with `with_types`, or replaces
built-in ones. `job_plan.py` gets a single type.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic.alias_generators import to_camel

from finetune_core.errors import UserError

GIBIBYTE = 1 << 30
"""Number of bytes in one GiB."""


class GpuType(BaseModel):
    """A type of GPU. All rates are peaks of the data sheet."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", alias_generator=to_camel, populate_by_name=True, allow_inf_nan=False
    )

    name: Annotated[str, Field(min_length=1, max_length=64)]
    """Name for `--gpu`, for example `H100-80GB`."""
    memory_gibibytes: Annotated[float, Field(gt=0, le=4096)]
    """Memory that a program can have, in GiB: `torch.cuda.get_device_properties(0).total_memory`. It is less than the
    memory on the data sheet, because the driver and error correction take their part."""
    tera_flops: Annotated[float, Field(gt=0, le=1e6)]
    """Dense bf16 arithmetic (without sparsity) in 10^12 FLOP/s."""
    memory_bandwidth: Annotated[float, Field(gt=0, le=1e6)]
    """Bandwidth of the memory in GB/s."""
    link_bandwidth: Annotated[float, Field(gt=0, le=1e6)]
    """Bandwidth between the GPUs of a node in GB/s, in one direction: NVLink, or else PCIe."""
    bf16: bool = True
    """Whether the GPU computes in bf16. ``tera_flops`` is the rate of fp16 where it does not."""
    kernels: bool = True
    """Whether torch in the trainer image has kernels for the GPU. Those of CUDA 13 begin with the generation Turing."""
    products: tuple[str, ...] = ()
    """Values of the node label `nvidia.com/gpu.product` that mean this type."""

    @property
    def memory(self) -> int:
        """Memory that a program can have, in bytes."""
        return int(self.memory_gibibytes * GIBIBYTE)


def _type(
    name: str,
    memory: float,
    flops: float,
    bandwidth: float,
    link: float,
    *products: str,
    bf16: bool = True,
    kernels: bool = True,
) -> GpuType:
    return GpuType(
        name=name,
        memory_gibibytes=memory,
        tera_flops=flops,
        memory_bandwidth=bandwidth,
        link_bandwidth=link,
        bf16=bf16,
        kernels=kernels,
        products=products,
    )


_V100_16GB = ("Tesla-V100-SXM2-16GB", "Tesla-V100-PCIE-16GB", "Tesla-V100-FHHL-16GB")
_V100_32GB = ("Tesla-V100-SXM2-32GB", "Tesla-V100-SXM3-32GB", "Tesla-V100-PCIE-32GB", "Tesla-V100S-PCIE-32GB")

# FLOP/s and bandwidths are those of NVIDIA's data sheet of each product, without sparsity. The memory is the total
# capacity that torch reports. PCIe 4.0 x16 has 32 GB/s in one direction, and PCIe 3.0 x16 has 16 GB/s.
GPU_TYPES: tuple[GpuType, ...] = (
    # V100 data sheet (2020), SXM: 125 TFLOP/s in fp16, 900 GB/s, NVLink 300 GB/s in both directions; no bf16.
    _type("V100-16GB", 15.8, 125, 900, 150, *_V100_16GB, bf16=False, kernels=False),
    _type("V100-32GB", 31.7, 125, 900, 150, *_V100_32GB, bf16=False, kernels=False),
    # T4 data sheet (2019): 65 TFLOP/s in fp16, 320 GB/s, PCIe 3.0; no bf16.
    _type("T4", 14.6, 65, 320, 16, "Tesla-T4", "NVIDIA-T4", bf16=False),
    # L4 data sheet (2023): 242 TFLOP/s with sparsity, 300 GB/s, PCIe 4.0.
    _type("L4", 22.0, 121, 300, 32, "NVIDIA-L4"),
    # A10G: data sheet of the A10 (2021) for the memory; 70 TFLOP/s by AWS for the A10G of G5 instances, 600 GB/s.
    _type("A10G", 22.0, 70, 600, 32, "NVIDIA-A10G"),
    # A10 data sheet (2021): 125 TFLOP/s, 600 GB/s, PCIe 4.0.
    _type("A10", 22.0, 125, 600, 32, "NVIDIA-A10"),
    # L40S data sheet (2023): 362 TFLOP/s, 864 GB/s, PCIe 4.0.
    _type("L40S", 44.4, 362, 864, 32, "NVIDIA-L40S"),
    # A100 data sheet (2021): 312 TFLOP/s, 40 GB with 1,555 GB/s, NVLink 600 GB/s in both directions.
    _type("A100-40GB", 39.4, 312, 1555, 300, "NVIDIA-A100-SXM4-40GB", "NVIDIA-A100-PCIE-40GB"),
    # The same data sheet: 80 GB SXM with 2,039 GB/s.
    _type("A100-80GB", 79.1, 312, 2039, 300, "NVIDIA-A100-SXM4-80GB", "NVIDIA-A100-80GB-PCIe"),
    # H100 data sheet (2023): SXM 1,979 TFLOP/s with sparsity, 3,350 GB/s, NVLink 900 GB/s in both directions.
    _type("H100-80GB", 79.1, 989.4, 3350, 450, "NVIDIA-H100-80GB-HBM3"),
    # H200 data sheet (2024): SXM, arithmetic and NVLink of the H100, 141 GB with 4,800 GB/s.
    _type("H200-141GB", 139.8, 989.4, 4800, 450, "NVIDIA-H200"),
    # B200: HGX B200 data sheet (2025) divided by 8: 2,250 TFLOP/s, 180 GB with 7,700 GB/s, NVLink 1,800 GB/s.
    _type("B200", 178.3, 2250, 7700, 900, "NVIDIA-B200"),
)
"""The types that are known without a file."""


def find_gpu(name: str, types: Iterable[GpuType] = GPU_TYPES, *, field: str = "--gpu") -> GpuType:
    """Return the type with the name or the product ``name``, in upper or lower case. Raises UserError, which names
    ``field`` and all known types, where there is none."""
    known = tuple(types)
    wanted = name.casefold()
    for gpu in known:
        if wanted in (gpu.name.casefold(), *(product.casefold() for product in gpu.products)):
            return gpu
    names = ", ".join(gpu.name for gpu in known)
    raise UserError(field, f"must be a type of GPU that the plan knows, and {name!r} is none; known are {names}")


def type_of_product(product: str) -> GpuType | None:
    """Return the built-in type of the value ``product`` of the node label `nvidia.com/gpu.product`, None where the
    table does not have it. GPUs that pods share by time slices have `-SHARED` at the end of the label."""
    try:
        return find_gpu(product.removesuffix("-SHARED"))
    except UserError:
        return None


def with_types(values: Any, source: str) -> tuple[GpuType, ...]:
    """Return the built-in types and those of ``values``, the parsed content of the file ``source``: a list of objects
    with the fields of `GpuType` in camelCase. A type of the file replaces the built-in type of the same name.

    Raises UserError that names the file, the entry and the field.
    """
    if not isinstance(values, list) or not values:
        raise UserError(
            source, "must be a list of GPU types, each an object with name, memoryGibibytes, teraFlops, ..."
        )
    own: dict[str, GpuType] = {}
    for place, value in enumerate(values):
        try:
            gpu = GpuType.model_validate(value)
        except ValidationError as error:
            first = error.errors()[0]
            path = ".".join(map(str, first["loc"]))
            raise UserError(f"{source}: [{place}]{'.' if path else ''}{path}", _sentence(first)) from None
        own[gpu.name.casefold()] = gpu
    kept = [gpu for gpu in GPU_TYPES if gpu.name.casefold() not in own]
    # The types of the file come first, so that a product that two types name means the user's type.
    return (*own.values(), *kept)


def _sentence(error: Mapping[str, Any]) -> str:
    if error["type"] == "missing":
        return "must be set"
    if error["type"] == "extra_forbidden":
        return "is no field of a GPU type"
    return f"must be another value: {error['msg']}"
