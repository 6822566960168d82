"""Determines how the artifact of a job is written, and tries out the export before the model's weights are loaded.

`preparation.py` calls both functions, and the preflight check calls `rehearse_job_export`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from finetune_core.contract import RunConfig
from finetune_core.errors import UserError
from finetune_trainer.checkpoints.export import ExportOptions
from finetune_trainer.checkpoints.rehearsal import rehearse_export
from finetune_trainer.data.tokenizer import generation_stop_ids, model_stop_ids
from finetune_trainer.model.adapters import AdapterTargets
from finetune_trainer.model.structure import ModelStructure, read_structure
from finetune_trainer.model.tensor_names import TensorNames
from finetune_trainer.model.weight_files import WeightFiles
from finetune_trainer.sources.inputs import model_revision, source_name


def job_export_options(
    config: RunConfig, model: Path, base: Path, structure: ModelStructure, stops: Sequence[int]
) -> ExportOptions:
    """Return how the artifact of the job is written. The fields `added_rows`, `base_sha256` and `origin` are None.
    `finish.py` sets them before the export.

    ``model`` is the folder of the base model. ``base`` is the folder of the extended base model if the run trains on
    one, and otherwise the same folder as ``model``. ``structure`` is the structure of the model in ``base``. ``stops``
    are the ids of the tokens at which the trained model stops.
    """
    only_adapter = config.lora is not None and config.storage.artifact == "Adapter"
    return ExportOptions(
        kind=config.storage.artifact,
        precision=config.optimization.precision,
        base=base,
        base_name=source_name(config.model),
        revision=model_revision(config.model, model),
        added_rows=None,
        stop_ids=stops,
        names=None if only_adapter else TensorNames(structure.model, WeightFiles.of(base).shapes),
    )


def rehearse_job_export(
    config: RunConfig, model: Path, base: Path, tokenizer: Any, targets: AdapterTargets, scratch: Path
) -> list[str]:
    """Try out the export of the artifact without its weights, in the new folder ``scratch``. Return notices about the
    artifact. Raises UserError where the artifact could not be written.

    ``targets`` names what the adapters are added to, and is empty for a full run. ``model`` and ``base`` are the
    folders that `job_export_options` describes. Of the weight files in them, only the headers are read.
    """
    structure = read_structure(base)
    stops = generation_stop_ids(tokenizer, config.dataset.format, model_stop_ids(model))
    trained = [name for name, _ in structure.model.named_parameters()]
    changed = targets.weight_names if config.lora is not None else trained
    only_adapter = config.lora is not None and config.storage.artifact == "Adapter"
    try:
        options = job_export_options(config, model, base, structure, stops)
        return rehearse_export(tokenizer, options, changed, scratch)
    except UserError as error:
        if config.lora is None or only_adapter:
            raise
        # If an adapter can't be written either, the cause is not the merged model, and the second rehearsal raises the
        # adapter's own error.
        storage = config.storage.model_copy(update={"artifact": "Adapter"})
        adapter = config.model_copy(update={"storage": storage})
        rehearse_export(tokenizer, job_export_options(adapter, model, base, structure, stops), changed, scratch)
        raise UserError("storage.artifact", f"must be Adapter: {error.problem}") from error
