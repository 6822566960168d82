"""Checks that the weight files of a model hold every weight of the model, as floating-point numbers and with the shape
that the model's configuration asks for. Only the headers of the files are read.

The headers pass through transformers' own loading code on torch's meta device. So the check sees each tensor as it will
be loaded, also where transformers renames, joins or leaves out tensors. `base_check.py` calls `check_weights` and
`check_sharded`.
"""

from __future__ import annotations

import copy
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers.utils import logging

from finetune_core.errors import UserError
from finetune_trainer.model.load import missing_weights
from finetune_trainer.model.structure import ModelStructure
from finetune_trainer.model.tensor_names import loaded_names, names_lost_in_shards
from finetune_trainer.model.weight_files import TensorHeader, WeightFiles
from finetune_trainer.pod.errors import first_line, library_boundary

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""The data types that weights may have in the files, by their names in safetensors. All other types have fewer than
16 bits, or are no floating-point numbers, as in quantised models."""


def check_weights(structure: ModelStructure, folder: Path, dtype: torch.dtype) -> list[str]:
    """Raise UserError where the weight files in ``folder`` lack a weight of ``structure``, or where a weight has
    another shape or is quantised. ``dtype`` is the data type in which the model will be loaded. Return a notice where
    the files have weights that the model does not use."""
    headers = WeightFiles.of(folder).headers()
    with library_boundary(_conversion_problem(headers)), _no_progress_bar():
        quantised = _quantised(structure, headers)
        state = {
            name: torch.empty(header.shape, dtype=DTYPES.get(header.dtype, torch.uint8), device="meta")
            for name, header in headers.items()
            if name not in quantised
        }
        model, report = type(structure.model).from_pretrained(
            None,
            config=copy.deepcopy(structure.model.config),
            state_dict=state,
            device_map={"": "meta"},
            dtype=dtype,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            local_files_only=True,
        )
    missing = missing_weights(model, report)
    if missing:
        raise UserError("model", _missing_problem(missing, headers, quantised, structure.model.base_model_prefix))
    for name, found, wanted in sorted(report["mismatched_keys"], key=lambda entry: str(entry[0])):
        raise UserError(
            "model",
            f"its config.json does not fit its weights: {name} has the shape {list(found)} in its files, and must have"
            f" {list(wanted)}",
        )
    return _unused_notice(report["unexpected_keys"], headers)


def check_sharded(structure: ModelStructure, folder: Path) -> None:
    """Raise UserError where transformers would leave out a weight in ``folder`` because ZeRO-3 shards the model."""
    headers = WeightFiles.of(folder).headers()
    with library_boundary(_conversion_problem(headers)):
        lost = names_lost_in_shards(structure.model, headers)
    if lost:
        raise UserError(
            "deepspeed.zeroStage",
            f"must be below 3 for this model: its files name a tensor {lost[0]}, which transformers can't load into a"
            " model that ZeRO 3 shards",
        )


def _quantised(structure: ModelStructure, headers: Mapping[str, TensorHeader]) -> set[str]:
    """Return the names of the tensors that are no floating-point numbers of 16 bits or more. Tensors that hold integers
    in the model too, such as tables that assign tokens to experts, are left out."""
    others = [name for name, header in headers.items() if header.dtype not in DTYPES]
    expected = structure.model.state_dict()
    loaded = loaded_names(structure.model, others)
    return {name for name in others if name not in loaded or expected[loaded[name]].is_floating_point()}


def _unused_notice(names: Collection[str], headers: Mapping[str, TensorHeader]) -> list[str]:
    """Return a notice about the tensors ``names``, which the model does not use. Tensors that ``headers`` shows to have
    fewer than two or more than three dimensions are left out. Most of them, such as the masks in old files, are no
    weights."""
    unused = sorted(name for name in names if name not in headers or len(headers[name].shape) in (2, 3))
    if not unused:
        return []
    weights = "1 weight" if len(unused) == 1 else f"{len(unused)} weights"
    return [f"model: its files have {weights} that a model with its config.json does not use, such as {unused[0]}"]


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    """Inside the block, transformers shows no progress bar. The bar would look as if weights were
    loaded, although only headers are."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _missing_problem(
    missing: list[str], headers: Mapping[str, TensorHeader], quantised: Collection[str], inner: str
) -> str:
    """Return what is wrong where the model got no tensor for the weights ``missing``. ``quantised`` are the tensors of
    the files that were left out because they are quantised. ``inner`` is the name of the model's inner part, which
    published files may leave out of the names."""
    if quantised:
        stems = {name.rpartition(".")[0] for name in missing}
        name = next((name for name in sorted(quantised) if name.rpartition(".")[0] in stems), min(quantised))
        return (
            f"its weights are quantised: {name} is stored as {headers[name].dtype}, and must be stored as F32, F16 or"
            " BF16; name the model from which it was made"
        )
    for name in missing:
        ends = (f".{name}", f".{name.removeprefix(f'{inner}.')}")
        longer = min((stored for stored in headers if stored.endswith(ends)), default=None)
        if longer is not None and longer not in quantised:
            # torch.compile, DistributedDataParallel and peft wrap a model, and put a prefix in front of its names.
            return (
                f"its files have other names than a model with its config.json: {longer} in place of {name}; save the"
                " model itself with save_pretrained, not the object around it"
            )
    return f"its files are incomplete: they lack {len(missing)} weights, such as {missing[0]}"


def _conversion_problem(headers: Mapping[str, TensorHeader]) -> Callable[[BaseException], Exception]:
    """Return a function that says what is wrong where transformers can't convert the tensors of a model."""

    def problem(error: BaseException) -> Exception:
        if isinstance(error, RuntimeError) and "conversion" in str(error):
            told = _odd_shape(headers) or _missing_part(headers)
            if told:
                return UserError("model", told)
        return UserError("model", f"its files can't be loaded: {first_line(error)}")

    return problem


def _odd_shape(headers: Mapping[str, TensorHeader]) -> str:
    """Return a sentence about a tensor that has another shape than most tensors of its kind. Two tensors are of one
    kind if their names differ only in numbers. The sentence is empty where there is no such tensor."""
    kinds: dict[str, list[str]] = defaultdict(list)
    for name in sorted(headers):
        kinds[re.sub(r"(?<=\.)\d+(?=\.)", "0", name)].append(name)
    for names in kinds.values():
        usual = Counter(headers[name].shape for name in names).most_common(1)[0][0]
        for name in names:
            if headers[name].shape != usual:
                return (
                    f"its weights do not fit together: {name} has the shape {list(headers[name].shape)}, and others of"
                    f" its kind have {list(usual)}"
                )
    return ""


def _missing_part(headers: Mapping[str, TensorHeader]) -> str:
    """Return a sentence about an expert that lacks a tensor which other experts of its layer have. The sentence is
    empty where there is no such expert."""
    numbers: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    for name in headers:
        parts = re.fullmatch(r"(.*\.\d+\..*)\.(\d+)\.(.*?)", name)
        if parts:
            numbers[parts[1]][parts[3]].add(parts[2])
    for place, kinds in sorted(numbers.items()):
        every = set().union(*kinds.values())
        for kind, found in sorted(kinds.items()):
            if found != every:
                lost = min(every - found, key=int)
                return f"its files are incomplete: they lack {place}.{lost}.{kind}"
    return ""
