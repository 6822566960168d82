"""Tries out before the first step what a run needs only at its end, so that no training is lost because the artifact
can't be written: writing the configuration and the tokenizer of the artifact, and finding a place in it for each
trained weight.

`job_export.py` calls `rehearse_export` before a model is loaded. This function reads no weight, so that the preflight
check can run it too. `train.py` calls `rehearse_adapter` with the model that will be trained.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path

import torch
from peft import PeftConfig, PeftModel, get_peft_model_state_dict
from transformers import GenerationConfig, PreTrainedTokenizerBase

from finetune_core.errors import UserError
from finetune_trainer.checkpoints.export import (
    ExportOptions,
    save_adapter_configuration,
    save_model_configuration,
    save_text_files,
)
from finetune_trainer.data.tokenizer import load_tokenizer
from finetune_trainer.model.configuration import load_configuration
from finetune_trainer.model.load import trained_parameters
from finetune_trainer.pod.errors import first_line, library_boundary

PROBE = "The model's artifact: 1 + 1 = 2\n"
"""A text of which the saved tokenizer must make the same token ids as the job's tokenizer."""


def rehearse_export(
    tokenizer: PreTrainedTokenizerBase, options: ExportOptions, changed: Iterable[str], scratch: Path
) -> list[str]:
    """Write the tokenizer and the generation configuration of an artifact, and the configuration of the model if the
    artifact has a whole model, into the new folder ``scratch``. Load these files again, and remove the folder. Return
    sentences about the fields of the base model's generation configuration that had to be repaired or left out.

    Of the model in the folder ``options.base`` only the text files are read here. ``options.names`` is None where the
    artifact is only an adapter. ``changed`` are the parameters of the base model for which the artifact has new values:
    all trained parameters of a full run, and the parameters that get an adapter where the artifact is a merged model.

    Raises UserError where the artifact could not be written, or could not be loaded.
    """
    scratch.mkdir(parents=True)
    try:
        if options.names is not None:
            options.names.check_writable(changed)
            save_model_configuration(scratch, options)
            load_configuration(scratch, "model")
        with library_boundary(_not_exported):
            notices = list(save_text_files(scratch, tokenizer, options))
            GenerationConfig.from_pretrained(scratch)
        _check_same(tokenizer, load_tokenizer(scratch))
    finally:
        shutil.rmtree(scratch)
    return notices


def _not_exported(error: BaseException) -> UserError:
    return UserError("model", f"it can't be exported: {first_line(error)}")


def _check_same(tokenizer: PreTrainedTokenizerBase, saved: PreTrainedTokenizerBase) -> None:
    """Raise UserError where the tokenizer ``saved`` has another end token, number of tokens or chat template than the
    job's ``tokenizer``, or makes other token ids of a text."""
    with library_boundary(_not_exported):
        text = PROBE + "".join(token.content for token in tokenizer.added_tokens_decoder.values())
        compared = {
            "end token": (tokenizer.eos_token_id, saved.eos_token_id),
            "number of tokens": (len(tokenizer), len(saved)),
            "token ids of a text": (tokenizer(text)["input_ids"], saved(text)["input_ids"]),
            "chat template": (_templates(tokenizer), _templates(saved)),
        }
    for what, (mine, its) in compared.items():
        if mine != its:
            raise UserError("model", f"its tokenizer can't be exported: it has another {what} after it was saved")


def _templates(tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """Return the chat templates of ``tokenizer`` by name. An unnamed template gets the name `default`, because
    transformers saves a single template of this name without the name. An empty list of templates is not saved at
    all."""
    templates = tokenizer.chat_template or {}
    return templates if isinstance(templates, dict) else {"default": templates}


def rehearse_adapter(model: PeftModel, options: ExportOptions, scratch: Path) -> None:
    """Write the configuration of the adapters of ``model`` into the new folder ``scratch``, load it again, and remove
    the folder. Raises UserError where peft would leave out a trained tensor or can't load the configuration."""
    scratch.mkdir(parents=True)
    trained = {name: torch.empty(0) for name in trained_parameters(model)}
    try:
        with library_boundary(lambda error: UserError("lora", f"its adapter can't be exported: {first_line(error)}")):
            written = get_peft_model_state_dict(model, state_dict=dict(trained), save_embedding_layers=False)
            save_adapter_configuration(model, scratch, options)
            PeftConfig.from_pretrained(str(scratch))
    finally:
        shutil.rmtree(scratch)
    if len(written) != len(trained):
        raise UserError(
            "lora", f"its adapter can't be exported: {len(trained) - len(written)} tensors have no place in it"
        )
