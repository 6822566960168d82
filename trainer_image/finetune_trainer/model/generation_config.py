"""The generation configuration of an artifact: that of the base model, in a form that transformers saves and loads,
with the tokens at which the trained model stops.

transformers reads many published configurations that it refuses to save after a change. `checkpoints/` calls
`artifact_generation_config` before the first step, so that no run finds this out at its end.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from transformers import GenerationConfig

from finetune_core.errors import UserError
from finetune_trainer.model.trial_generation import unusable_fields
from finetune_trainer.pod.errors import first_line, library_boundary, one_line
from finetune_trainer.pod.faulty_field import explained
from finetune_trainer.pod.model_file_names import CONFIG_FILE, GENERATION_CONFIG_FILE
from finetune_trainer.pod.model_text_files import read_json_object

SMALLEST = 1e-5
"""The smallest divisor of logits with which probabilities are still numbers. vLLM, too, takes a lower temperature for
0."""
SAMPLING: Mapping[str, Callable[[float], bool]] = {
    "temperature": lambda value: value >= SMALLEST,
    "top_k": lambda value: value > 0 and value == int(value),
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
    "repetition_penalty": lambda value: SMALLEST <= value <= 1 / SMALLEST,
    "encoder_repetition_penalty": lambda value: SMALLEST <= value <= 1 / SMALLEST,
    "num_beams": lambda value: value >= 1 and value == int(value),
    "num_return_sequences": lambda value: value >= 1 and value == int(value),
    "max_length": lambda value: value >= 1 and value == int(value),
    "max_new_tokens": lambda value: value >= 1 and value == int(value),
    "min_length": lambda value: value >= 0 and value == int(value),
    "min_new_tokens": lambda value: value >= 0 and value == int(value),
    "no_repeat_ngram_size": lambda value: value >= 0 and value == int(value),
    "encoder_no_repeat_ngram_size": lambda value: value >= 0 and value == int(value),
    "length_penalty": lambda value: abs(value) <= 100,
    "max_time": lambda value: value > 0,
    "guidance_scale": lambda value: abs(value) <= 1 / SMALLEST,
}
"""Fields that have an effect in every generation, and the values with which transformers can generate."""
FORMS: Mapping[str, Callable[[Any], bool]] = {
    "stop_strings": lambda value: _texts(value if isinstance(value, list) else [value]),
    "exponential_decay_length_penalty": lambda value: (
        isinstance(value, list)
        and len(value) == 2
        and all(type(part) in (int, float) and math.isfinite(part) and part >= 0 for part in value)
        and value[0] == int(value[0])
    ),
}
"""Fields with values of another kind, and the forms with which transformers can generate. A short trial would not find
a wrong value: the first field needs a tokenizer, and the second has an effect only after many tokens."""
WHOLE = (
    "top_k", "num_beams", "num_return_sequences", "max_length", "max_new_tokens", "min_length", "min_new_tokens",
    "no_repeat_ngram_size", "encoder_no_repeat_ngram_size",
)  # fmt: skip
"""Fields of SAMPLING and ALWAYS that must be whole numbers. transformers wants all others as floating-point numbers."""
DECIDING = ("do_sample", "num_beams", "return_dict_in_generate", "use_cache")
"""Fields whose values decide which other fields transformers accepts."""


class ArtifactGeneration(NamedTuple):
    """The generation configuration of an artifact."""

    config: GenerationConfig
    notices: Sequence[str]
    """Sentences about what differs from the base model's configuration, except the stop tokens."""


def artifact_generation_config(base: Path, stop_ids: Sequence[int], *, vocabulary: int) -> ArtifactGeneration:
    """Return the generation configuration for the artifact of a job whose base model is in the folder ``base`` and has
    ``vocabulary`` tokens. Texts end at ``stop_ids``.

    transformers refuses fields of sampling, such as a temperature, without `do_sample: true`. Where `do_sample` is
    absent, it becomes true if transformers can draw with all these fields, as the publishers of such models did later.
    Where it is false, or where transformers can't draw with them, these fields are left out. Where it is true, a
    temperature of 0 switches sampling off, because no text can be drawn with it. All further fields that transformers
    refuses, or with which it can't generate, are left out. Raises UserError where the base model's configuration can't
    be read.
    """
    values = _base_values(base)
    notices: list[str] = []
    _repair_numbers(values, notices)
    _repair_forms(values, notices, vocabulary)
    if values.get("do_sample") is not True:
        _repair_sampling(values, notices)
    values["eos_token_id"] = list(stop_ids) if len(stop_ids) > 1 else stop_ids[0]
    dropped = _refused_fields(values)
    for name in dropped:
        del values[name]
    if dropped:
        notices.append(
            f"model: its {GENERATION_CONFIG_FILE} has {', '.join(sorted(dropped))} with values that transformers does"
            " not save; the artifact has the default values"
        )
    return ArtifactGeneration(GenerationConfig(**values), notices)


def _base_values(base: Path) -> dict[str, Any]:
    """Return the fields of the base model's generation configuration that differ from the defaults."""
    file = GENERATION_CONFIG_FILE
    if not (base / file).is_file():
        file = CONFIG_FILE  # in this case, transformers makes a generation configuration of the model's configuration
    if not (base / file).is_file():
        return {}
    with library_boundary(lambda error: UserError("model", f"its {file} can't be used: {first_line(error)}")):
        read_json_object(base / file)

    def read(folder: Path) -> dict[str, Any]:
        config = GenerationConfig.from_pretrained(
            folder, config_file_name=file, local_files_only=True, _from_model_config=file == CONFIG_FILE
        )
        found: dict[str, Any] = json.loads(config.to_json_string(use_diff=True))
        return found

    # A wrong file can make the code of transformers raise any exception.
    with library_boundary(
        lambda error: UserError("model", f"its {file} can't be used: {explained(base, [file], read, error)}")
    ):
        values = read(base)
    return {name: value for name, value in values.items() if name not in ("transformers_version", "_from_model_config")}


def _repair_numbers(values: dict[str, Any], notices: list[str]) -> None:
    """Write the numbers in ``values`` with the types that transformers wants, and delete those with which it can't
    generate. Fields of sampling are checked only where `do_sample` is true. A temperature of 0 then deletes
    `do_sample` and all fields of sampling. Add a notice about deleted numbers to ``notices``."""
    for name in (*SAMPLING, *ALWAYS):
        value = values.get(name)
        if name in WHOLE and isinstance(value, float) and value.is_integer():
            values[name] = int(value)
        elif name not in WHOLE and type(value) is int:
            values[name] = float(value)
    draws = values.get("do_sample") is True
    bounds = {**ALWAYS, **(SAMPLING if draws else {})}
    wrong = [name for name in bounds if values.get(name) is not None and not _fits(name, values[name], bounds[name])]
    if not wrong:
        return
    greedy = "temperature" in wrong and _below(values["temperature"], SMALLEST)
    named = _named(values, wrong)
    for name in [*wrong, *((*SAMPLING, "do_sample") if greedy else ())]:
        values.pop(name, None)
    told = "the artifact has no do_sample" if greedy else "the artifact leaves this out"
    notices.append(f"model: its {GENERATION_CONFIG_FILE} has {named}, with which no text can be generated; {told}")


def _repair_forms(values: dict[str, Any], notices: list[str], vocabulary: int) -> None:
    """Delete the fields of ``values`` that are no plain numbers and with which transformers can't generate. Add a
    notice about them to ``notices``."""
    wrong = unusable_fields(values, vocabulary=vocabulary)
    wrong += [name for name, fits in FORMS.items() if values.get(name) is not None and not fits(values[name])]
    if not wrong:
        return
    named = _named(values, wrong)
    for name in wrong:
        del values[name]
    notices.append(
        f"model: its {GENERATION_CONFIG_FILE} has {named}, with which no text can be generated; the artifact leaves"
        " this out"
    )


def _named(values: Mapping[str, Any], names: Sequence[str]) -> str:
    """Return the fields ``names`` with their values, as a message lists them."""
    return ", ".join(f"{name} {one_line(str(values[name]), limit=40)}" for name in sorted(names))


def _below(value: Any, bound: float) -> bool:
    return type(value) in (int, float) and 0 <= value < bound


def _texts(values: list[Any]) -> bool:
    return bool(values) and all(isinstance(value, str) and value for value in values)


def _fits(name: str, value: Any, bound: Callable[[float], bool]) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return False
    return bound(value) or OFF.get(name) == value


def _repair_sampling(values: dict[str, Any], notices: list[str]) -> None:
    """Where transformers refuses fields of sampling in ``values`` because `do_sample` is not true, change ``values``
    and add a notice about this to ``notices``. `do_sample` becomes true if it is absent and transformers can draw with
    all values. Otherwise all fields of sampling are deleted."""
    present = sorted(name for name in SAMPLING if values.get(name) is not None)
    refused = [name for name in present if _refuses({name: values[name]})]
    if not refused:
        return
    drawable = all(type(values[name]) in (int, float) and SAMPLING[name](values[name]) for name in present)
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


def _refused_fields(values: Mapping[str, Any]) -> list[str]:
    """Return the fields that have to be left out of ``values``, so that transformers saves the configuration."""
    if not _refuses(values):
        return []
    others = [name for name in values if name != "eos_token_id"]
    alone = next((name for name in others if not _refuses({k: v for k, v in values.items() if k != name})), None)
    if alone is not None:
        return [alone]
    # Each field is kept if transformers accepts it together with the fields kept before. The fields DECIDING come
    # first, because without them transformers would refuse others.
    kept: dict[str, Any] = {"eos_token_id": values["eos_token_id"]}
    for name in sorted(others, key=lambda name: name not in DECIDING):
        if not _refuses({**kept, name: values[name]}):
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
