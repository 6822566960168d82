"""Prepares the base model, an adapter that the job starts from, and the rows of all data sets as local files, and loads
them.

`train.py` calls `prepare_node` on the first rank of each node, which writes the files that all ranks of the node share.
Then `train.py` calls `load_data` and `load_model` on every rank.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune_core.contract import AdapterOrigin, ContractModel
from finetune_core.errors import UserError
from finetune_trainer.checkpoints.export import ExportOptions
from finetune_trainer.checkpoints.job_export import job_export_options, rehearse_job_export
from finetune_trainer.checkpoints.merged_base import write_merged_base
from finetune_trainer.data.chat.chat_template import use_chat_template
from finetune_trainer.data.dataset import length_limit
from finetune_trainer.data.examples import ExampleSet
from finetune_trainer.data.formats import TokenizeFunctions
from finetune_trainer.data.mixture import Mixture, mix_digest
from finetune_trainer.data.tokenizer import (
    generation_stop_ids,
    load_tokenizer,
    model_stop_ids,
    stop_ids,
    tokenize_functions,
)
from finetune_trainer.engine.config import shard_new_models
from finetune_trainer.model.adapter_fit import check_copies
from finetune_trainer.model.adapters import adapts_an_embedding, add_adapters, reach_notice
from finetune_trainer.model.added_rows import AddedRows, find_added_rows, read_added_rows
from finetune_trainer.model.base_check import JobBase, check_base
from finetune_trainer.model.extended_base import extend_base
from finetune_trainer.model.given_adapter import FIELD as ADAPTER
from finetune_trainer.model.given_adapter import adapter_of, with_settings_of
from finetune_trainer.model.load import DTYPES, enable_gradient_checkpointing, load_base, own_dropout
from finetune_trainer.model.structure import ModelStructure, read_structure
from finetune_trainer.model.tensor_names import TensorNames
from finetune_trainer.model.weight_files import WeightFiles
from finetune_trainer.node_examples import (
    Encoding,
    ExamplePreparation,
    data_sets,
    examples_folder,
    mix_notice,
    mixture_of,
)
from finetune_trainer.pod.model_file_names import ADAPTER_CONFIG_FILE
from finetune_trainer.pod.plan import WorkerPlan
from finetune_trainer.reporting.progress import log_line
from finetune_trainer.sources.inputs import adapter_name, model_revision, source_name


class PreparationSummary(ContractModel):
    """What `prepare_node` found and wrote on one node. Every rank of the gang receives the summary."""

    notices: list[str]
    """Sentences for the log and the reports, for example one for each kind of row that was skipped."""
    context: int
    """Length in tokens of the longest example that the model and `dataset.maxLength` allow."""
    data_sha256: str
    """sha256 over the token ids of the training rows, and over the ranges of supervised tokens in each row. For a mix,
    the number of examples of each source is included."""
    evaluation_sha256: dict[str, str] = {}
    """For `validation` and `test`, if the job has such rows: sha256 over their token ids, over the ranges of supervised
    tokens, and over the columns that graders read."""
    mix_sizes: list[int] = []
    """Number of examples of each source of `dataset.train.mix`. Empty without a mix."""
    model_context: int
    """Length in tokens of the longest text that the model can read, or `dataset.maxLength` where the model has no
    limit."""
    added_rows: AddedRows | None = None
    """Where the embedding rows of `model.addedTokens` lie in the base model; None without added tokens."""
    added_rows_sha256: str | None = None
    """sha256 over the values of the embedding rows in `added_rows`, in fp32. None without added tokens."""
    adapted_share: float | None = None
    """Share of the weights in the model's layers that LoRA adapters can change, from 0 to 1. None without adapters."""
    origin: AdapterOrigin | None = None
    """The adapter that the training starts from. None without one."""
    adapter_base_sha256: str | None = None
    """sha256 of the base model's weights that the adapter of `origin` was trained on, by its own account. None where it
    does not say."""


def agreed_summary(answers: Sequence[object]) -> PreparationSummary:
    """Return the summary on which all nodes agree.

    ``answers`` has one entry for each rank: the summary as JSON from the first rank of a node, None from other ranks.
    Raises UserError where two nodes have different rows, for example because a branch or a file changed between their
    reads, different embedding rows for the added tokens, or different adapters.
    """
    summaries = [PreparationSummary.model_validate(answer) for answer in answers if answer is not None]
    first = summaries[0]
    for other in summaries[1:]:
        changed = [name for name, digest in first.evaluation_sha256.items() if other.evaluation_sha256[name] != digest]
        if (other.data_sha256, other.added_rows_sha256) != (first.data_sha256, first.added_rows_sha256):
            changed.insert(0, "train")
        if changed:
            raise UserError(
                f"dataset.{changed[0]}",
                "the nodes of this job read different rows: it changed while they started; name a commit as"
                " `revision`, or a file that nobody writes to",
            )
    # The revisions of an adapter may differ, because a node that took the files from a cache knows only the name of the
    # branch.
    if len({summary.origin.sha256 for summary in summaries if summary.origin is not None}) > 1:
        raise UserError(
            ADAPTER,
            "the nodes of this job read different files: the adapter changed while they started; name a commit as"
            " `revision`, or a folder that nobody writes to",
        )
    return first


@dataclass(frozen=True)
class TrainingData:
    """The tokenizer and the tokenised rows of a job, loaded on one rank."""

    tokenizer: Any
    structure: ModelStructure
    """All modules of the base model, or of the extended base model where the job has one, without weights."""
    train: ExampleSet
    validation: ExampleSet
    test: ExampleSet
    capacity: int | None
    """Largest length of a packed sequence in tokens. None means that each sequence holds one example."""
    stop_ids: list[int]
    """Token ids that end a generated answer."""
    summary: PreparationSummary
    mixture: Mixture | None = None
    """How the training examples of the sources of `dataset.train.mix` are mixed. None without a mix."""

    @property
    def pad(self) -> int:
        """Return the token id that fills up short sequences of a batch. Any id would do, because no position attends to
        padding."""
        return int(self.tokenizer.eos_token_id)


def prepare_node(
    plan: WorkerPlan, graded: Collection[str], *, stop: Callable[[], bool] = lambda: False
) -> PreparationSummary:
    """Write the files that the ranks of this node share: the tokenised rows and, where needed, a base model with a
    merged adapter and an extended base model.

    ``graded`` holds all columns that the job's grader reads. It is empty where the job has no task. Once ``stop``
    returns True, no further rows are tokenised, and StopAgreed is raised.

    Raises UserError for bad input, such as incomplete model files, rows that the job does not allow, or LoRA target
    modules that the model does not have.
    """
    base, config = job_base(plan), plan.config
    notices = check_base(base)
    structure, targets = base.structure, base.targets
    if base.merged is not None:
        dtype = DTYPES[config.optimization.precision]
        write_merged_base(plan.inputs.model, _merged_folder(plan), structure, base.merged, dtype)
        log_line(f"the adapter {adapter_name(config)} is merged into the base model")
    if config.model.added_tokens or base.unties:
        extend_base(
            base_model_folder(plan),
            _extended_folder(plan),
            tokens=config.model.added_tokens,
            untie=base.unties,
            seed=config.optimization.seed,
        )
    if base.continued is not None:
        check_copies(base.continued, base_model_folder(plan), DTYPES[config.optimization.precision])
    tokenizer = _job_tokenizer(plan)
    limit = length_limit(config.dataset, structure.context, base.rows)
    preparation = ExamplePreparation(plan, _job_encoding(plan), limit=limit, graded=graded, stop=stop)
    notices += rehearse_job_export(
        config, plan.inputs.model, base_model_folder(plan), tokenizer, targets, plan.folder / "rehearsal"
    )
    if rate := own_dropout(structure.model):
        notices.append(
            f"the dropout of the base model's configuration (up to {rate:g}) is switched off, so that a run can be"
            " repeated; lora.dropout is the dropout of a training"
        )
    if targets.names:
        notices.append(reach_notice(targets))
    if config.model.added_tokens and targets.names and not adapts_an_embedding(structure, targets):
        notices.append(
            "model.addedTokens: the adapters leave out both embeddings, so the new rows stay as they were drawn"
        )
    data_sha256, mix_sizes = "", []
    evaluation_sha256: dict[str, str] = {}
    for name, parts in data_sets(plan).items():
        whole = preparation.prepare(name, parts)
        notices += whole.notices
        if name != "train":
            evaluation_sha256[name] = whole.examples.digest_with_rows
            continue
        data_sha256 = whole.examples.digest
        if plan.inputs.mix:
            mix_sizes = whole.sizes
            data_sha256 = mix_digest(data_sha256, mix_sizes)
            notices.append(mix_notice(parts, mixture_of(plan, mix_sizes)))
    rows = _added_rows(plan, structure, tokenizer)
    return PreparationSummary(
        notices=notices,
        context=limit.tokens,
        data_sha256=data_sha256,
        evaluation_sha256=evaluation_sha256,
        mix_sizes=mix_sizes,
        model_context=structure.context or config.dataset.max_length,
        added_rows=rows,
        added_rows_sha256=_rows_sha256(plan, rows),
        adapted_share=targets.share if targets.names else None,
        origin=_origin(plan, base),
        adapter_base_sha256=base.fitted.given.base_sha256 if base.fitted is not None else None,
    )


def job_base(plan: WorkerPlan) -> JobBase:
    """Return the base model of the job and the adapter that it starts from, as their files describe them."""
    return JobBase(plan.inputs.model, plan.config, plan.inputs.adapter, source_name(plan.config.model))


def with_adapter_settings(plan: WorkerPlan) -> WorkerPlan:
    """Return ``plan`` with the settings of the adapter in `lora`, where the job continues one. Raises UserError where
    the adapter is of another kind, or where `lora` has other settings."""
    return plan.model_copy(update={"config": with_settings_of(plan.config, adapter_of(plan.inputs.adapter))})


def _origin(plan: WorkerPlan, base: JobBase) -> AdapterOrigin | None:
    """Return what the records of the run say of the adapter that the training starts from."""
    config, folder = plan.config, plan.inputs.adapter
    source = config.model.adapter
    if base.fitted is None or source is None or folder is None:
        return None
    artifact = config.adapter_artifact if source.job is not None else None
    return AdapterOrigin(
        use=source.use,
        source=adapter_name(config),
        revision=model_revision(source, folder, ADAPTER_CONFIG_FILE),
        job_uid=artifact.job_uid if artifact is not None else None,
        sha256=base.fitted.given.sha256,
    )


def export_options(plan: WorkerPlan, structure: ModelStructure, stops: Sequence[int]) -> ExportOptions:
    """Return how the artifact of the job is written (see `job_export_options`)."""
    return job_export_options(plan.config, plan.inputs.model, base_model_folder(plan), structure, stops)


def load_data(plan: WorkerPlan, summary: PreparationSummary) -> TrainingData:
    """Load the job's tokenizer, and the tokenised rows that `prepare_node` wrote."""
    tokenizer = _job_tokenizer(plan)
    present = data_sets(plan)
    sets = {
        name: ExampleSet.load(examples_folder(plan, name)) if name in present else ExampleSet.empty()
        for name in ("train", "validation", "test")
    }
    dataset = plan.config.dataset
    return TrainingData(
        tokenizer=tokenizer,
        structure=read_structure(base_model_folder(plan)),
        train=sets["train"],
        validation=sets["validation"],
        test=sets["test"],
        capacity=summary.context if dataset.packing else None,
        stop_ids=generation_stop_ids(tokenizer, dataset.format, model_stop_ids(plan.inputs.model)),
        summary=summary,
        mixture=mixture_of(plan, summary.mix_sizes) if summary.mix_sizes else None,
    )


def load_model(plan: WorkerPlan) -> Any:
    """Return the model to train: the base model, with LoRA adapters where the method is LoRA.

    Under ZeRO-3 all ranks must call this function together, because the ranks exchange weights while they load the
    model. Each rank keeps only its shard of the weights.
    """
    config, folder = plan.config, base_model_folder(plan)
    base = job_base(plan)
    targets = base.targets
    sharding = shard_new_models(config.optimization, config.world.size)
    model = load_base(
        folder,
        DTYPES[config.optimization.precision],
        sharded=sharding is not None,
        quantization=config.lora.quantization if config.lora is not None else None,
    )
    # Keep a reference to the object that switches sharding on. transformers holds only a weak reference to this object,
    # and still needs the object in `generate`.
    model.sharding = sharding
    if config.optimization.gradient_checkpointing:
        enable_gradient_checkpointing(model)
    if config.lora is None:
        return model
    return add_adapters(
        model,
        config.lora,
        targets=targets.modules,
        parameters=targets.parameters,
        seed=config.optimization.seed,
        base_name=source_name(config.model),
        given=base.continued,
    )


def base_model_folder(plan: WorkerPlan) -> Path:
    """Return the folder of the base model that the run trains: the extended copy, else the copy with a merged adapter,
    else the base model itself. Where `prepare_node` wrote both copies, it made the extended copy of the merged one."""
    for folder in (_extended_folder(plan), _merged_folder(plan)):
        if folder.is_dir():
            return folder
    return plan.inputs.model


def publishes_extended_base(plan: WorkerPlan) -> bool:
    """Return whether the artifact is an adapter of a base model that the job has changed (with added tokens, an untied
    head or a merged adapter), which the job has to publish too."""
    config = plan.config
    extended = base_model_folder(plan) != plan.inputs.model
    return extended and config.lora is not None and config.storage.artifact != "Merged"


def _job_tokenizer(plan: WorkerPlan) -> Any:
    """Return the tokenizer of the model that the run trains, with the chat template of the job."""
    tokenizer = load_tokenizer(base_model_folder(plan))
    use_chat_template(tokenizer, plan.config.dataset.format, plan.inputs.model)
    return tokenizer


def job_tokenize_functions(plan: WorkerPlan) -> TokenizeFunctions:
    """Return the functions that turn rows into the token ids of the trained model, whose tokenizer has the added tokens
    of the job."""
    encoding = _job_encoding(plan)
    return tokenize_functions(encoding.tokenizer, encoding.added_tokens, ends=encoding.ends, today=encoding.today)


def _job_encoding(plan: WorkerPlan) -> Encoding:
    config, tokenizer = plan.config, _job_tokenizer(plan)
    ends = stop_ids(tokenizer, config.dataset.format, model_stop_ids(plan.inputs.model))
    return Encoding(tokenizer, config.model.added_tokens, ends, config.template_date)


def _extended_folder(plan: WorkerPlan) -> Path:
    return plan.folder / "base"


def _merged_folder(plan: WorkerPlan) -> Path:
    return plan.folder / "merged-base"


def _added_rows(plan: WorkerPlan, structure: ModelStructure, tokenizer: Any) -> AddedRows | None:
    """Return where the embedding rows of the added tokens lie in the base model's files. None without added tokens."""
    if not plan.config.model.added_tokens:
        return None
    ids = [tokenizer.convert_tokens_to_ids(token) for token in plan.config.model.added_tokens]
    # The rows of the input embedding are enough where the base model's output head is tied to the input embedding. The
    # same holds where the head was untied for LoRA, because an untied head begins as a copy of the input embedding.
    stored_once = structure.tied or structure.output_name is None
    extended = base_model_folder(plan)
    names = TensorNames(read_structure(extended).model, WeightFiles.of(extended).shapes)
    return find_added_rows(structure, names, ids, shared=stored_once)


def _rows_sha256(plan: WorkerPlan, rows: AddedRows | None) -> str | None:
    if rows is None:
        return None
    sha256 = hashlib.sha256()
    for tensor in read_added_rows(base_model_folder(plan), rows, DTYPES["fp32"]).values():
        sha256.update(tensor.numpy().tobytes())
    return sha256.hexdigest()
