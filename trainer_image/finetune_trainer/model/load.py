"""Loads the base model from local files. `preparation.py` calls `load_base` on every rank."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, GenerationConfig, PreTrainedModel
from transformers.quantizers.base import get_keys_to_not_convert

from finetune_core.api.method import Quantization
from finetune_core.errors import UserError
from finetune_trainer.model.adaptable import layers_read_past
from finetune_trainer.model.configuration import load_configuration
from finetune_trainer.model.mmap_memory import release_mapped_pages
from finetune_trainer.model.packed_attention import install as install_packed_attention
from finetune_trainer.model.structure import read_structure
from finetune_trainer.model.weight_files import WeightFiles, write_index
from finetune_trainer.pod.errors import first_line
from finetune_trainer.pod.model_file_names import CONFIG_FILE, SINGLE_FILE

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def nf4_configuration(folder: Path, dtype: torch.dtype) -> BitsAndBytesConfig:
    """Return how QLoRA holds the linear layers of the model in ``folder``: as 4-bit NormalFloat, with quantized scales,
    and computed in ``dtype``. The output head, and layers whose weight the code of the model reads itself, stay as they
    are."""
    model = read_structure(folder).model
    left_out = layers_read_past(model)
    return BitsAndBytesConfig(
        # Without this list, transformers leaves out only the output head.
        llm_int8_skip_modules=[*get_keys_to_not_convert(model), *left_out] if left_out else None,
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def load_base(
    folder: Path, dtype: torch.dtype, *, sharded: bool = False, quantization: Quantization | None = None
) -> PreTrainedModel:
    """Load the base model in ``folder`` and return it with weights in ``dtype``. Raises UserError where the files are
    not those of a complete causal language model.

    With ``sharded`` (ZeRO-3) the weights are copied from memory-mapped files into the shards of the ranks. While this
    happens, the memory of the mapped files is freed again and again. With ``quantization`` the linear layers are held
    in 4 bits.

    The returned model has transformers' default settings for generating texts. The base model's own settings are only
    for the artifact. In an evaluation they would still have an effect, because transformers takes each setting that a
    call of `generate` leaves open from the model. Some settings, such as `stop_strings`, also need arguments that an
    evaluation does not pass.
    """
    try:
        with (
            _model_alone(folder) as alone,
            release_mapped_pages(folder) if sharded else contextlib.nullcontext(),
        ):
            model, report = AutoModelForCausalLM.from_pretrained(
                alone,
                config=load_configuration(alone, "model"),
                dtype=dtype,
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
                output_loading_info=True,
                **({"quantization_config": nf4_configuration(folder, dtype)} if quantization is not None else {}),
            )
    except (OSError, ValueError, LookupError, TypeError, AttributeError, ImportError) as error:
        raise UserError("model", f"its files can't be loaded: {first_line(error)}") from error
    except RuntimeError as error:
        # torch raises RuntimeError for lack of memory and for lost ranks too, which are not the model's fault.
        if "ignore_mismatched_sizes" not in str(error):
            raise
        raise UserError("model", "its config.json does not fit its weights: they have other shapes") from error
    missing = missing_weights(model, report)
    if missing:
        # Missing weights are an error here. transformers would give them random values, and only warns.
        raise UserError("model", f"its files are incomplete: they lack {len(missing)} weights, such as {missing[0]}")
    model.config.use_cache = False
    model.generation_config = GenerationConfig()
    if quantization is not None:
        _keep_exact_scales(model)
    switch_off_dropout(model)
    install_packed_attention()
    return model


def own_dropout(model: torch.nn.Module) -> float:
    """Return the largest rate of dropout that ``model`` has by its own configuration, from 0 to 1."""
    return max((rate for module in model.modules() for rate in _dropout_rates(module).values()), default=0.0)


def switch_off_dropout(model: torch.nn.Module) -> None:
    """Set all rates of dropout in ``model`` to zero. torch draws this dropout from a random stream, with which no run
    could be repeated, and packed and padded examples would have different losses. The configuration keeps its
    rates."""
    for module in model.modules():
        for name in _dropout_rates(module):
            setattr(module, name, 0.0)


def _dropout_rates(module: torch.nn.Module) -> dict[str, float]:
    """Return the attributes of ``module`` that are rates of dropout above zero."""
    if isinstance(module, torch.nn.modules.dropout._DropoutNd):
        return {"p": module.p} if module.p > 0 else {}
    # Many models have no dropout module. They keep the rate as a number, and pass the number to a function.
    return {
        name: value
        for name, value in vars(module).items()
        if ("dropout" in name or "pdrop" in name) and isinstance(value, float) and value > 0
    }


@contextlib.contextmanager
def _model_alone(folder: Path) -> Iterator[Path]:
    """Yield a folder with links to those files in ``folder`` from which the model is loaded. From ``folder`` itself,
    transformers would also load an adapter if there is one. The index of several weight files is written anew, because
    a published index may lack a part that transformers needs."""
    with TemporaryDirectory() as alone:
        weights = WeightFiles.of(folder)
        for name in (CONFIG_FILE, *weights.names):
            if (folder / name).is_file():
                (Path(alone) / name).symlink_to((folder / name).resolve())
        if weights.names != [SINGLE_FILE]:
            write_index(Path(alone), weights.files)
        yield Path(alone)


def missing_weights(model: PreTrainedModel, report: Mapping[str, Any]) -> list[str]:
    """Return the names of the weights that ``model`` did not find in its files, in alphabetical order. ``report`` is
    transformers' report about the loading. A weight that is tied to another weight is not missing."""
    shared = getattr(model, "all_tied_weights_keys", {})
    return sorted(key for key in report["missing_keys"] if key not in shared)


def _keep_exact_scales(model: PreTrainedModel) -> None:
    """Keep bitsandbytes from rounding the scales of 4-bit weights.

    On processors that multiply in bf16, bitsandbytes rounds the scales to bf16 when a layer first computes in
    evaluation mode. The model would then change with the first evaluation.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def enable_gradient_checkpointing(model: Any) -> None:
    """Let ``model`` compute activations again in the backward pass instead of storing them. For this, the output of the
    input embedding is made to require a gradient, even where the embedding is frozen."""
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def trained_parameters(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """Return the trained parameters by name, in the model's order. A tied parameter appears once."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
