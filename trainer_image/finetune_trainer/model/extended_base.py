"""Writes an extended copy of a base model: with the job's added tokens in tokenizer and embeddings, and with separate
weights for the output head where LoRA adapts the input embedding or the head, and these two share their weights.

`preparation.py` writes the copy before any model is loaded, so that loading, ZeRO-3 and export all see one ordinary
model folder. The random values of an added token's rows depend only on the seed, the token, the embedding (input or
output), and the model's hidden size and `initializer_range`.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from finetune_core.errors import UserError
from finetune_trainer.data.tokenizer import add_tokens, load_tokenizer
from finetune_trainer.model.configuration import without_kernels
from finetune_trainer.model.structure import ModelStructure, read_structure
from finetune_trainer.model.tensor_names import TensorNames
from finetune_trainer.model.weight_files import WeightFiles, write_index
from finetune_trainer.pod.errors import first_line, library_boundary
from finetune_trainer.pod.model_file_names import CONFIG_FILE, SINGLE_FILE

TEXT_SUFFIXES = (".json", ".model", ".txt", ".jinja")
"""Suffixes of the files with configuration and tokenizer in a model's folder."""
DEFAULT_SPREAD = 0.02
"""Standard deviation of new embedding rows where the model's configuration has no `initializer_range`: the value of
GPT-2."""


def initial_row(token: str, *, matrix: str, width: int, spread: float, seed: int) -> torch.Tensor:
    """Return the initial embedding row of an added token, a tensor of shape (width,) in fp32. The values of the row are
    drawn from a normal distribution with standard deviation ``spread``, as in the model's own initialisation.
    ``matrix`` names the embedding: `input` or `output`."""
    digest = hashlib.blake2b(f"{seed}/{matrix}/{token}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)
    return torch.empty(width, dtype=torch.float32).normal_(0, spread, generator=generator)


def extend_base(source: Path, target: Path, *, tokens: Sequence[str], untie: bool, seed: int) -> None:
    """Write a copy of the model folder ``source`` to ``target``, with ``tokens`` added. With ``untie`` the output head
    of the copy does not share its weights with the input embedding.

    Weight files in which nothing changes are linked, not copied. Raises UserError where the model can't be extended
    (see `check_extendable`), or where its `initializer_range` is no positive number below 100.
    """
    target.mkdir(parents=True)
    structure, weights = read_structure(source), WeightFiles.of(source)
    tokenizer = load_tokenizer(source)
    ids = add_tokens(tokenizer, tokens)
    tokenizer.save_pretrained(target)
    config = json.loads((source / CONFIG_FILE).read_text())
    text = config["text_config"] if isinstance(config.get("text_config"), dict) else config
    rows = max(structure.rows, *(number + 1 for number in ids), 0)
    names = check_extendable(structure, weights, rows=rows, untie=untie)
    input_name, output_name = f"{structure.input_name}.weight", f"{structure.output_name}.weight"
    copies = names.copies(input_name)
    spread = text.get("initializer_range") or DEFAULT_SPREAD
    if not isinstance(spread, int | float) or not 0 < spread < 100:
        raise UserError("model", f"its {CONFIG_FILE} must have a positive number as initializer_range")
    first = next(iter(copies.values()))

    def extended(weight: torch.Tensor, matrix: str) -> torch.Tensor:
        grown = torch.zeros((rows, weight.shape[1]), dtype=weight.dtype)
        grown[: weight.shape[0]] = weight
        for token, row in zip(tokens, ids, strict=True):
            grown[row] = initial_row(token, matrix=matrix, width=weight.shape[1], spread=spread, seed=seed).to(
                weight.dtype
            )
        return grown

    # The files may hold two copies of a tied weight. transformers does not tie copies that differ, so each copy keeps
    # its own values.
    changed = {stored: extended(weights.tensor(stored), "input") for stored in copies.values()}
    if structure.tied and untie:
        # The untied head begins as a copy of the input embedding. Each added token's row is drawn once, for both.
        missing = [name for name in (input_name, output_name) if name not in copies]
        changed |= {names.new_stored_name(name): changed[first].clone() for name in missing}
    elif not structure.tied:
        output_key = names.copies(output_name)[output_name]
        changed[output_key] = extended(weights.tensor(output_key), "output")
    for bias in names.copies(f"{structure.output_name}.bias").values():
        old_bias = weights.tensor(bias)
        changed[bias] = torch.cat([old_bias, old_bias.new_zeros(rows - old_bias.shape[0])])
    text["vocab_size"] = rows
    if "vocab_size" in config:
        config["vocab_size"] = rows
    if untie:
        text["tie_word_embeddings"] = config["tie_word_embeddings"] = False
    (target / CONFIG_FILE).write_text(json.dumps(without_kernels(config), indent=2, sort_keys=True) + "\n")
    _write_weights(weights, target, changed, beside=weights.files[first])
    copy_text_files(source, target)


def copy_text_files(source: Path, target: Path) -> None:
    """Copy the files with configuration and tokenizer of the model in ``source`` to ``target``, except those that are
    there already."""
    for path in source.iterdir():
        if _is_text_file_of_model(path) and not (target / path.name).exists():
            (target / path.name).write_bytes(path.read_bytes())


def check_extendable(structure: ModelStructure, weights: WeightFiles, *, rows: int, untie: bool) -> TensorNames:
    """Return the names of the tensors in ``weights``. Raises UserError where `extend_base` can't extend the model to
    ``rows`` rows of the embeddings: where it has no output head, where its files lack an embedding, or where it has
    another tensor with values for each token. Only the headers of the files are read."""
    if structure.output_name is None:
        raise UserError("model.addedTokens", "must be empty: the model has no output head")
    names = TensorNames(structure.model, weights.shapes, "model.addedTokens")
    input_name, output_name = f"{structure.input_name}.weight", f"{structure.output_name}.weight"
    copies = names.copies(input_name)
    if not copies:
        raise UserError("model.addedTokens", f"must be empty: the model's files have no tensor for {input_name}")
    if structure.tied and untie:
        for name in (input_name, output_name):
            if name not in copies:
                names.new_stored_name(name)
    elif not structure.tied and output_name not in names.copies(output_name):
        raise UserError("model.addedTokens", f"must be empty: the model's files have no tensor for {output_name}")
    other = _other_rows(structure, rows)
    if other is not None:
        raise UserError("model.addedTokens", f"must be empty: the model has {other} with values for each of its tokens")
    return names


def _other_rows(structure: ModelStructure, rows: int) -> str | None:
    """Return the name of a tensor beside the embeddings that has another shape in a model with ``rows`` rows of the
    embeddings."""
    if rows == structure.rows:
        return None
    grown = model_with_rows(structure, rows).state_dict()
    embeddings = (structure.input_name, structure.output_name)
    return next(
        (
            name
            for name, tensor in structure.model.state_dict().items()
            if name.rpartition(".")[0] not in embeddings and grown[name].shape != tensor.shape
        ),
        None,
    )


def model_with_rows(structure: ModelStructure, rows: int) -> Any:
    """Return a new model on the meta device with the modules of ``structure`` and ``rows`` rows of the embeddings."""
    config = copy.deepcopy(structure.model.config)
    config.get_text_config().vocab_size = rows
    # A wrong file can make the code of transformers raise any exception.
    with (
        library_boundary(lambda error: UserError("model.addedTokens", f"must be empty: {first_line(error)}")),
        torch.device("meta"),
    ):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=False)


def _is_text_file_of_model(path: Path) -> bool:
    """Return whether ``path`` is a file that transformers reads beside the weights. A folder on a volume may hold other
    files too, such as weights in other formats, or an adapter that transformers would add to the model."""
    return (
        path.is_file()
        and path.suffix in TEXT_SUFFIXES
        and not path.name.startswith("adapter_")
        and not path.name.endswith(".index.json")
    )


def _write_weights(weights: WeightFiles, target: Path, changed: Mapping[str, torch.Tensor], *, beside: str) -> None:
    """Write the weight files that hold a tensor of ``changed``, and link the other files. A new tensor, which is in no
    file yet, goes into the file ``beside``."""
    places = {**dict.fromkeys(changed, beside), **weights.files}
    files = sorted(set(places.values()))
    for name in files:
        inside = [key for key, place in places.items() if place == name]
        if not any(key in changed for key in inside):
            _link(weights.folder / name, target / name)
            continue
        with safe_open(weights.folder / name, framework="pt") as file:
            tensors = {key: changed[key] if key in changed else file.get_tensor(key) for key in sorted(inside)}
        save_file(tensors, target / name, {"format": "pt"})
    if files != [SINGLE_FILE]:
        write_index(target, places)


def _link(source: Path, target: Path) -> None:
    """Make ``target`` a hard link to ``source``, or a symbolic link where no hard link can be made, for example because
    both lie on different volumes."""
    try:
        os.link(source.resolve(), target)
    except OSError:
        target.symlink_to(source.resolve())
