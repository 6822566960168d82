"""The generation configuration of an artifact: that of the base model, in a form that transformers saves and loads,
with the tokens at which the trained model stops.

transformers reads many published configurations that it refuses to save after a change. `checkpoints/` calls
`artifact_generation_config` before the first step, so that no run finds this out at its end.
"""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from transformers import GenerationConfig

from finetune_core.errors import UserError
from finetune_trainer.model.trial_generation import can_generate
from finetune_trainer.pod.errors import first_line, library_boundary, one_line
from finetune_trainer.pod.faulty_field import explained
from finetune_trainer.pod.model_file_names import CONFIG_FILE, GENERATION_CONFIG_FILE
from finetune_trainer.pod.model_text_files import read_json_object

SMALLEST = 1e-30
"""The smallest temperature. transformers divides float32 logits by the temperature, and on a GPU it multiplies them by
the temperature's reciprocal. The largest float32 number is 3e38, so that with this temperature logits up to 3e8 remain
numbers, and the reciprocal is far from the limit."""
STRONGEST = 1e5
"""The largest penalty or guidance that multiplies logits. Logits up to 1000 remain numbers with it, also where they are
then divided by SMALLEST."""
MOST_TEXTS = 1024
"""The largest number of texts that are generated together, each of which needs memory of its own."""
LARGEST_INTEGER = 2**63 - 1
"""The largest integer that PyTorch, and most readers of JSON, take."""
SAMPLING: Mapping[str, Callable[[float], bool]] = {
    "temperature": lambda value: SMALLEST <= value <= 1 / SMALLEST,
    "top_k": lambda value: value > 0,
    "top_p": lambda value: 0 < value <= 1,
    "min_p": lambda value: 0 <= value <= 1,
    "top_h": lambda value: 0 < value <= 1,
    "typical_p": lambda value: 0 < value < 1,
    "epsilon_cutoff": lambda value: 0 < value < 1,
    "eta_cutoff": lambda value: 0 < value < 1,
}
"""Fields that only have an effect when a text is drawn at random (`do_sample: true`), and the values with which
transformers can draw."""
OFF: Mapping[str, float] = {"top_k": 0, "top_p": 0, "typical_p": 1, "epsilon_cutoff": 0, "eta_cutoff": 0}
"""For some fields of SAMPLING, one more value with which transformers can draw a text. The bounds in SAMPLING exclude
this value."""
ALWAYS: Mapping[str, Callable[[float], bool]] = {
    "repetition_penalty": lambda value: 1 / STRONGEST <= value <= STRONGEST,
    "encoder_repetition_penalty": lambda value: 1 / STRONGEST <= value <= STRONGEST,
    "num_beams": lambda value: 1 <= value <= MOST_TEXTS,
    "num_return_sequences": lambda value: 1 <= value <= MOST_TEXTS,
    "max_length": lambda value: value >= 1,
    "max_new_tokens": lambda value: value >= 1,
    "min_length": lambda value: value >= 0,
    "min_new_tokens": lambda value: value >= 0,
    "no_repeat_ngram_size": lambda value: value >= 0,
    "encoder_no_repeat_ngram_size": lambda value: value >= 0,
    "length_penalty": lambda value: abs(value) <= 100,
    "max_time": lambda value: value > 0,
    "guidance_scale": lambda value: abs(value) <= STRONGEST,
    "max_cache_len": lambda value: value >= 1,
    "prefill_chunk_size": lambda value: value >= 1,
    "num_assistant_tokens": lambda value: value >= 1,
    "prompt_lookup_num_tokens": lambda value: value >= 1,
    "max_matching_ngram_size": lambda value: value >= 0,
    "assistant_early_exit": lambda value: value >= 1,
    "assistant_lookbehind": lambda value: value >= 0,
    "target_lookbehind": lambda value: value >= 0,
    "assistant_confidence_threshold": lambda value: 0 <= value <= 1,
    "assistant_ensemble_weight": lambda value: 0 < value < 1,
    "num_beam_groups": lambda value: 1 <= value <= MOST_TEXTS,
    "diversity_penalty": lambda value: 0 <= value <= STRONGEST,
    "penalty_alpha": lambda value: 0 <= value <= 1,
}
"""Numbers that do not depend on `do_sample`, and the values with which transformers can generate."""
SWITCHES = (
    "do_sample", "use_cache", "output_attentions", "output_hidden_states", "output_scores", "output_logits",
    "return_dict_in_generate", "remove_invalid_values", "renormalize_logits", "token_healing", "low_memory",
    "disable_compile", "is_assistant", "use_mtp",
)  # fmt: skip
"""Fields that switch something on or off. transformers reads any value, and takes wrong ones sometimes for true and
sometimes for false."""
FORMS: Mapping[str, Callable[[Any], bool]] = {
    **dict.fromkeys(SWITCHES, lambda value: isinstance(value, bool)),
    "stop_strings": lambda value: _texts(value if isinstance(value, list) else [value]),
    "exponential_decay_length_penalty": lambda value: (
        isinstance(value, list)
        and len(value) == 2
        and all(type(part) in (int, float) and 0 <= part <= LARGEST_INTEGER for part in value)
        and value[0] == int(value[0])
    ),
    "num_assistant_tokens_schedule": lambda value: value in ("constant", "heuristic", "heuristic_transient"),
    "speculation_type": lambda value: value == "dflash",
    "cache_config": lambda value: isinstance(value, dict),
    "continuous_batching_config": lambda value: isinstance(value, dict),
}
"""Fields with values of another kind, and the forms with which transformers can generate. A short trial would not find
a wrong value: some fields need a tokenizer or a second model, and others have an effect only after many tokens."""
TOKENS = (
    "bos_token_id", "decoder_start_token_id", "forced_bos_token_id", "forced_eos_token_id", "pad_token_id",
)  # fmt: skip
"""Fields that hold a token id or a list of token ids. Some have an effect only with several prompts, or without one, so
that a trial would not find a token that the model does not have."""
WHOLE = (
    "top_k", "num_beams", "num_return_sequences", "max_length", "max_new_tokens", "min_length", "min_new_tokens",
    "no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "max_cache_len", "prefill_chunk_size",
    "num_assistant_tokens", "prompt_lookup_num_tokens", "max_matching_ngram_size", "assistant_early_exit",
    "assistant_lookbehind", "target_lookbehind", "num_beam_groups",
)  # fmt: skip
"""Fields of SAMPLING and ALWAYS that must be whole numbers. transformers wants all others as floating-point numbers."""
DECIDING = ("do_sample", "num_beams", "return_dict_in_generate", "use_cache")
"""Fields whose values decide which other fields transformers accepts."""
BOOKKEEPING = ("transformers_version", "_from_model_config")
"""Fields that transformers writes for itself."""


class ArtifactGeneration(NamedTuple):
    """The generation configuration of an artifact."""

    config: GenerationConfig
    notices: Sequence[str]
    """Sentences about what differs from the base model's configuration, except the stop tokens."""


def artifact_generation_config(base: Path, stop_ids: Sequence[int], *, vocabulary: int) -> ArtifactGeneration:
    """Return the generation configuration for the artifact of a job whose base model is in the folder ``base`` and
    computes ``vocabulary`` logits for each token. Texts end at ``stop_ids``.

    transformers refuses fields of sampling, such as a temperature, without `do_sample: true`. Where `do_sample` is
    absent, it becomes true if transformers can draw with all these fields, as the publishers of such models did later.
    Where it is false, or where transformers can't draw with them, these fields are left out. Where it is true, a
    temperature of 0 switches sampling off, because no text can be drawn with it. All further fields that transformers
    refuses, or with which it can't generate, are left out. Raises UserError where transformers can't read the base
    model's configuration.
    """
    notices: list[str] = []
    values = _base_values(base, notices)
    _repair_forms(values, notices, vocabulary)
    _repair_numbers(values, notices)
    if values.get("do_sample") is not True:
        _repair_sampling(values, notices)
    values["eos_token_id"] = list(stop_ids) if len(stop_ids) > 1 else stop_ids[0]
    refused = _unaccepted(values, lambda fields: not _refuses(fields))
    for name in refused:
        del values[name]
    if refused:
        notices.append(
            f"model: its {GENERATION_CONFIG_FILE} has {_names(refused)} with values that transformers does not save;"
            " the artifact has the default values"
        )
    unusable = _unaccepted(values, lambda fields: not _refuses(fields) and can_generate(fields, vocabulary=vocabulary))
    _leave_out(values, unusable, notices)
    return ArtifactGeneration(GenerationConfig(**values), notices)


def _base_values(base: Path, notices: list[str]) -> dict[str, Any]:
    """Return the fields of the base model's generation configuration that differ from the defaults. Add a notice to
    ``notices`` about those that can't be fields."""
    file = GENERATION_CONFIG_FILE
    if not (base / file).is_file():
        file = CONFIG_FILE  # in this case, transformers makes a generation configuration of the model's configuration
    if not (base / file).is_file():
        return {}
    with library_boundary(lambda error: UserError("model", f"its {file} can't be used: {first_line(error)}")):
        content = read_json_object(base / file)

    def read(folder: Path) -> dict[str, Any]:
        fields = {name: value for name, value in read_json_object(folder / file).items() if not _reserved(name)}
        make = GenerationConfig.from_model_config if file == CONFIG_FILE else GenerationConfig.from_dict
        found: dict[str, Any] = json.loads(make(fields).to_json_string(use_diff=True))
        return found

    # A wrong file can make the code of transformers raise any exception.
    with library_boundary(
        lambda error: UserError("model", f"its {file} can't be used: {explained(base, [file], read, error)}")
    ):
        values = read(base)
    reserved = [name for name in content if _reserved(name)]
    if reserved and file == GENERATION_CONFIG_FILE:
        notices.append(
            f"model: its {file} has {_names(reserved)}, which transformers uses for itself and can't have as a field;"
            " the artifact leaves this out"
        )
    return {name: value for name, value in values.items() if name not in BOOKKEEPING}


def _reserved(name: str) -> bool:
    """Return whether a field ``name`` would hide a method of GenerationConfig or of Python, or would be a second value
    for an argument of `update`, to which transformers passes the fields as keyword arguments."""
    arguments = inspect.signature(GenerationConfig.update).parameters
    return hasattr(GenerationConfig, name) or name.startswith("__") or name in arguments


def _repair_forms(values: dict[str, Any], notices: list[str], vocabulary: int) -> None:
    """Delete the fields of ``values`` whose values have a form with which transformers can't generate or which other
    programs can't read. Add a notice about them to ``notices``."""
    unreadable = [name for name, value in values.items() if not _plain(value)]
    foreign = [name for name in unreadable if name not in vars(GenerationConfig())]
    _leave_out(values, foreign, notices, why="which holds numbers that other programs can't read")
    wrong = [name for name in unreadable if name not in foreign]
    wrong += [name for name, fits in FORMS.items() if values.get(name) is not None and not fits(values[name])]
    wrong += [name for name in TOKENS if values.get(name) is not None and not _tokens(values[name], vocabulary)]
    _leave_out(values, dict.fromkeys(wrong), notices)


def _plain(value: Any) -> bool:
    """Return whether all numbers in ``value`` are finite, and all integers have at most 64 bits."""
    if isinstance(value, list):
        return all(map(_plain, value))
    if isinstance(value, dict):
        return all(map(_plain, value.values()))
    if isinstance(value, float):
        return math.isfinite(value)
    return not isinstance(value, int) or abs(value) <= LARGEST_INTEGER


def _tokens(value: Any, vocabulary: int) -> bool:
    """Return whether ``value`` is a token id, or a list of token ids. A negative id of the padding counts too, because
    transformers itself refuses it."""
    parts = value if isinstance(value, list) else [value]
    return bool(parts) and all(type(part) is int and part < vocabulary for part in parts)


def _repair_numbers(values: dict[str, Any], notices: list[str]) -> None:
    """Write the numbers in ``values`` with the types that transformers wants, and delete those with which it can't
    generate. Fields of sampling are checked only where `do_sample` is true. A temperature of 0 then deletes
    `do_sample` and all fields of sampling. Add a notice about deleted numbers to ``notices``."""
    for name in (*SAMPLING, *ALWAYS):
        value = values.get(name)
        if name in WHOLE and isinstance(value, float) and value.is_integer() and _plain(int(value)):
            values[name] = int(value)
        elif name not in WHOLE and type(value) is int:
            values[name] = float(value)
    draws = values.get("do_sample") is True
    bounds = {**ALWAYS, **(SAMPLING if draws else {})}
    wrong = [
        name
        for name in bounds
        if values.get(name) is not None and not _fits(name, values[name]) and OFF.get(name) != values[name]
    ]
    if "temperature" in wrong and _below(values["temperature"], SMALLEST):
        greedy = [name for name in (*SAMPLING, "do_sample") if name in values and name not in wrong]
        _leave_out(values, wrong, notices, told="the artifact has no do_sample")
        for name in greedy:
            del values[name]
    else:
        _leave_out(values, wrong, notices)


def _leave_out(
    values: dict[str, Any],
    wrong: Iterable[str],
    notices: list[str],
    *,
    why: str = "with which no text can be generated",
    told: str = "the artifact leaves this out",
) -> None:
    """Delete the fields ``wrong`` of ``values``, and add a notice about them to ``notices`` if there are any."""
    names = list(wrong)
    if not names:
        return
    named = _named(values, names)
    for name in names:
        del values[name]
    notices.append(f"model: its {GENERATION_CONFIG_FILE} has {named}, {why}; {told}")


def _named(values: Mapping[str, Any], names: Sequence[str]) -> str:
    """Return the fields ``names`` with their values, as a message lists them."""
    return ", ".join(f"{_names([name])} {one_line(str(values[name]), limit=40)}" for name in sorted(names))


def _names(names: Sequence[str]) -> str:
    """Return the names of fields, which the file may have chosen, as a message lists them."""
    return ", ".join(one_line(name, limit=60) or '""' for name in sorted(names))


def _below(value: Any, bound: float) -> bool:
    return type(value) in (int, float) and 0 <= value < bound


def _texts(values: list[Any]) -> bool:
    return bool(values) and all(isinstance(value, str) and value for value in values)


def _fits(name: str, value: Any) -> bool:
    """Return whether ``value`` has the type and the bounds of the field ``name`` of SAMPLING or ALWAYS."""
    if isinstance(value, bool) or not isinstance(value, int if name in WHOLE else int | float):
        return False
    return (SAMPLING.get(name) or ALWAYS[name])(value)


def _repair_sampling(values: dict[str, Any], notices: list[str]) -> None:
    """Where transformers refuses fields of sampling in ``values`` because `do_sample` is not true, change ``values``
    and add a notice about this to ``notices``. `do_sample` becomes true if it is absent and transformers can draw with
    all values. Otherwise all fields of sampling are deleted."""
    present = sorted(name for name in SAMPLING if values.get(name) is not None)
    refused = [name for name in present if _refuses({name: values[name]})]
    if not refused:
        return
    drawable = all(_fits(name, values[name]) for name in present)
    named = _named(values, refused)
    if "do_sample" not in values and drawable:
        values["do_sample"] = True
        notices.append(
            f"model: its {GENERATION_CONFIG_FILE} has {named} without do_sample; the artifact has do_sample true"
        )
        return
    for name in present:
        del values[name]
    notices.append(
        f"model: its {GENERATION_CONFIG_FILE} has {named}, which can't be used without do_sample; the artifact leaves"
        " this out"
    )


def _unaccepted(values: Mapping[str, Any], accepts: Callable[[Mapping[str, Any]], bool]) -> list[str]:
    """Return the fields that have to be left out of ``values``, so that ``accepts`` is true for the others."""
    if accepts(values):
        return []
    # The fields DECIDING are the last to be left out, because without them transformers would refuse others.
    others = sorted((name for name in values if name != "eos_token_id"), key=lambda name: name not in DECIDING)
    alone = next((name for name in reversed(others) if accepts({k: v for k, v in values.items() if k != name})), None)
    if alone is not None:
        return [alone]
    # Each field is kept if it is accepted together with the fields kept before.
    kept: dict[str, Any] = {"eos_token_id": values["eos_token_id"]}
    for name in others:
        if accepts({**kept, name: values[name]}):
            kept[name] = values[name]
    return [name for name in values if name not in kept]


def _refuses(values: Mapping[str, Any]) -> bool:
    """Return whether transformers refuses to save a configuration with ``values`` or to load it again, or would load it
    with other values."""
    try:
        # The checks of transformers raise different kinds of exceptions.
        with library_boundary(lambda error: ValueError(first_line(error))):
            config = GenerationConfig(**values)
            config.validate(strict=True)
            loaded = GenerationConfig.from_dict(json.loads(config.to_json_string(use_diff=True)))
    except ValueError:
        return True
    return bool(loaded != config)
