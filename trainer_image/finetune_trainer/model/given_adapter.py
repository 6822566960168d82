"""Reads the adapter that a job starts from (`model.adapter`): its `adapter_config.json`, and the header of its weight
file. Refuses kinds of adapters that the trainer can't use, and takes settings of `lora` over from the adapter.

`adapter_fit.py` compares the tensors with the base model. This module does without torch, so that the first part of the
preflight check can call it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

from safetensors import safe_open

from finetune_core.api.method import LoRASpec
from finetune_core.contract import RunConfig
from finetune_core.errors import UserError
from finetune_core.target_modules import is_pattern
from finetune_trainer.pod.errors import OutsideFailure, first_line, library_boundary, one_line
from finetune_trainer.pod.model_file_names import ADAPTER_CONFIG_FILE, ADAPTER_FILE
from finetune_trainer.pod.model_text_files import check_no_pointer, pointer_problem

FIELD = "model.adapter"
NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "bias": ("none",),
    "lora_bias": (),
    "layer_replication": (),
    "trainable_token_indices": (),
    "use_qalora": (),
    "use_bdlora": (),
    "alora_invocation_tokens": (),
    "arrow_config": (),
    "kasa_config": (),
    "monteclora_config": (),
    "velora_config": (),
    "megatron_config": (),
}
"""Fields of `adapter_config.json` by which an adapter is more than two matrices and the norms of DoRA. The trainer
knows nothing else, so each of these fields must be absent, null, false, empty or one of the values given here."""
PLAIN_STARTS = (None, True, False, "gaussian", "orthogonal", "eva")
"""Values of `init_lora_weights` that leave the base model as it is. Others, such as PiSSA, put a part of the base
model's weights into the adapter, which then fits only the base model that is left."""
DESCRIPTIVE = frozenset(
    {
        "auto_mapping",
        "base_model_name_or_path",
        "corda_config",
        "eva_config",
        "inference_mode",
        "init_lora_weights",
        "loftq_config",
        "lora_alpha",
        "lora_dropout",
        "lora_ga_config",
        "megatron_core",
        "peft_type",
        "peft_version",
        "qalora_group_size",
        "r",
        "revision",
        "runtime_config",
        "task_type",
    }
)
"""Further fields of `adapter_config.json` that are read elsewhere, or that say nothing of how the matrices of a
finished adapter are used."""
MOST_RANK, MOST_ALPHA = 512, 1024
"""Largest rank and alpha, as in `lora`."""
MOST_PATTERNS = 1024
"""Largest number of entries of `rank_pattern` and `alpha_pattern`. peft compares each with the name of each module."""
LARGEST_SCALE = 1_000_000
"""Largest absolute value in `alpha_pattern`. A comparison with it also refuses NaN and infinity, which Python reads in
JSON."""
BASE_DIGEST = "base_model_sha256"
"""Key in `auto_mapping` of `adapter_config.json`. Its value is the sha256 of the base model's weights, which the
trainer writes there. peft ignores the key there, because peft reads `auto_mapping` only where `task_type` is absent,
and the trainer always sets `task_type`. At the top level of the configuration, peft would warn of a key that it does
not know."""


def _is_list(value: object, kind: type) -> bool:
    return isinstance(value, list) and all(type(item) is kind for item in value)


def _is_names(value: object) -> bool:
    return isinstance(value, str) or _is_list(value, str)


def _is_layers(value: object) -> bool:
    return type(value) is int or _is_list(value, int)


def _is_layers_pattern(value: object) -> bool:
    # peft compares these names by Python's `re`, whose time has no bound for a regular expression.
    names = value if isinstance(value, list) else [value]
    return all(isinstance(name, str) and not is_pattern(name) for name in names)


def _is_ranks(value: object) -> bool:
    return _is_numbers(value) and all(1 <= rank <= MOST_RANK and rank == int(rank) for rank in value.values())


def _is_numbers(value: object) -> TypeGuard[dict[str, float]]:
    if not isinstance(value, dict) or len(value) > MOST_PATTERNS:
        return False
    return all(type(item) in (int, float) and abs(item) <= LARGEST_SCALE for item in value.values())


_SWITCH = (lambda value: isinstance(value, bool), "true or false")
_NAMES = (_is_names, "names of modules")
KINDS: Mapping[str, tuple[Callable[[object], bool], str]] = {
    "target_modules": _NAMES,
    "exclude_modules": _NAMES,
    "modules_to_save": (lambda value: _is_list(value, str), "a list of names of modules"),
    "target_parameters": (lambda value: _is_list(value, str), "a list of names of parameters"),
    "layers_to_transform": (_is_layers, "numbers of layers"),
    "layers_pattern": (_is_layers_pattern, "names of modules"),
    "rank_pattern": (_is_ranks, f"at most {MOST_PATTERNS} names with whole numbers from 1 to {MOST_RANK}"),
    "alpha_pattern": (_is_numbers, f"at most {MOST_PATTERNS} names with numbers of at most {LARGEST_SCALE}"),
    "use_rslora": _SWITCH,
    "use_dora": _SWITCH,
    "fan_in_fan_out": _SWITCH,
    "ensure_weight_tying": _SWITCH,
}
"""For each other field of `adapter_config.json` that is read: what its value must be unless the field is absent or
null, as a test and in words."""


class AdapterTensor(NamedTuple):
    """What the header of an adapter's weight file says of a tensor."""

    dtype: str
    """Data type in the words of safetensors, for example `BF16`."""
    shape: tuple[int, ...]


@dataclass(frozen=True)
class GivenAdapter:
    """An adapter in a local folder, of a kind that the trainer can use."""

    folder: Path
    """Folder with `adapter_config.json` and `adapter_model.safetensors`. In the preflight check, the bytes
    of the tensors may be holes. `sha256` needs these bytes."""
    config: Mapping[str, Any]
    """Content of `adapter_config.json`."""

    @classmethod
    def read(cls, folder: Path) -> GivenAdapter:
        """Read `adapter_config.json` of the adapter in ``folder``. Raises UserError where the trainer can't use this
        kind of adapter, or where the file is no JSON object."""
        try:
            content = (folder / ADAPTER_CONFIG_FILE).read_bytes()
            if problem := pointer_problem(ADAPTER_CONFIG_FILE, content):
                raise UserError(FIELD, problem)
            config = json.loads(content)
            if not isinstance(config, dict):
                raise TypeError("it is no object")
        except (ValueError, TypeError, RecursionError) as error:
            raise UserError(FIELD, f"its {ADAPTER_CONFIG_FILE} must be a JSON object ({first_line(error)})") from error
        _check_kind(config)
        return cls(folder, config)

    @property
    def rank(self) -> int:
        """Rank of the adapter, except of modules in `rank_pattern`."""
        return _whole_number(self.config, "r", 8, MOST_RANK)

    @property
    def alpha(self) -> int:
        """LoRA's alpha of the adapter, except of modules in `alpha_pattern`."""
        return _whole_number(self.config, "lora_alpha", 8, MOST_ALPHA)

    @property
    def rs_lora(self) -> bool:
        """Whether the adapter is rank-stabilized."""
        return bool(self.config.get("use_rslora"))

    @property
    def do_ra(self) -> bool:
        """Whether the adapter has trained norms (DoRA)."""
        return bool(self.config.get("use_dora"))

    @property
    def base_name(self) -> str:
        """Name of the base model that the adapter was trained on, by its own account; empty where it names none."""
        name = self.config.get("base_model_name_or_path")
        return name if isinstance(name, str) else ""

    @property
    def base_sha256(self) -> str | None:
        """sha256 of the weights of the base model that the adapter was trained on. None where it is not recorded."""
        mapping = self.config.get("auto_mapping")
        value = mapping.get(BASE_DIGEST) if isinstance(mapping, dict) else None
        return value if isinstance(value, str) else None

    @property
    def unknown_fields(self) -> list[str]:
        """The fields that are set in `adapter_config.json` and that the trainer does not know, sorted. peft leaves out
        such a field with a warning, and so does the trainer."""
        known = {*NEUTRAL, *KINDS, *DESCRIPTIVE}
        return sorted(name for name, value in self.config.items() if value and name not in known)

    @cached_property
    def tensors(self) -> Mapping[str, AdapterTensor]:
        """The tensors in the adapter's weight file, by name. Only the header is read. Raises UserError where the file
        is broken or holds no tensor, and OutsideFailure where the file can't be read."""
        found = {}
        with library_boundary(_unreadable):
            check_no_pointer(self.folder / ADAPTER_FILE)
        with library_boundary(_unreadable), safe_open(self.folder / ADAPTER_FILE, framework="numpy") as file:
            for name in file.keys():  # noqa: SIM118  (the file is no mapping)
                part = file.get_slice(name)
                found[name] = AdapterTensor(part.get_dtype(), tuple(part.get_shape()))
        if not found:
            raise UserError(FIELD, f"its {ADAPTER_FILE} holds no tensor")
        return found

    @cached_property
    def sha256(self) -> str:
        """sha256 over the names and contents of the two files. Every byte is read."""
        text = ""
        for name in (ADAPTER_CONFIG_FILE, ADAPTER_FILE):
            with (self.folder / name).open("rb") as file:
                text += f"{name} {hashlib.file_digest(file, 'sha256').hexdigest()}\n"
        return hashlib.sha256(text.encode()).hexdigest()


def adapter_of(folder: Path | None) -> GivenAdapter | None:
    """Return the adapter in ``folder``; None where the job has none."""
    return GivenAdapter.read(folder) if folder is not None else None


def with_settings_of(config: RunConfig, given: GivenAdapter | None) -> RunConfig:
    """Return ``config`` with the settings of ``given`` in `lora`, where the job continues the adapter.

    Raises UserError where `lora` has other settings than the adapter. `lora.targetModules` is compared later, with the
    modules of the base model.
    """
    source = config.model.adapter
    if given is None or config.lora is None or source is None or source.use != "Continue":
        return config
    lora = config.lora
    taken: dict[str, int | bool | None] = {}
    settings = {"rank": given.rank, "alpha": given.alpha, "rs_lora": given.rs_lora, "do_ra": given.do_ra}
    for name, value in settings.items():
        wanted = getattr(lora, name)
        if wanted is not None and wanted != value:
            field = LoRASpec.model_fields[name].alias or name
            raise UserError(
                f"lora.{field}",
                f"must be absent or {_shown(value)}, as in the adapter that the job continues, and is {_shown(wanted)}",
            )
        # A variant that is switched off is absent, as in the run file of a job without an adapter.
        taken[name] = value if value is not False else None
    return config.model_copy(update={"lora": lora.model_copy(update=taken)})


def _shown(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _check_kind(config: Mapping[str, Any]) -> None:
    """Raise UserError where `adapter_config.json` describes an adapter that the trainer can't use."""
    kind = config.get("peft_type")
    if kind != "LORA":
        raise UserError(FIELD, f"must be a LoRA adapter, and its peft_type is {_quoted(kind)}")
    task = config.get("task_type")
    if task not in (None, "CAUSAL_LM"):
        raise UserError(FIELD, f"must be an adapter of a causal language model, and its task_type is {_quoted(task)}")
    for name, allowed in NEUTRAL.items():
        value = config.get(name)
        if value and value not in allowed:
            must = f"{allowed[0]!r}" if allowed else "absent"
            raise UserError(
                FIELD,
                f"is a kind of LoRA adapter that can't be used: its {name} is {_quoted(value)} and must be {must}",
            )
    start = config.get("init_lora_weights")
    if not isinstance(start, bool | str | None) or start not in PLAIN_STARTS:
        raise UserError(
            FIELD,
            f"is a kind of LoRA adapter that can't be used: its init_lora_weights is {_quoted(start)}, so it holds a"
            " part of its base model's weights; convert it to a plain LoRA adapter with peft",
        )
    for name, most in (("r", MOST_RANK), ("lora_alpha", MOST_ALPHA)):
        _whole_number(config, name, 8, most)
    for name, (is_right, must) in KINDS.items():
        value = config.get(name)
        if value is not None and not is_right(value):
            raise UserError(FIELD, f"its {name} must be {must}, and is {_quoted(value)}")


def _whole_number(config: Mapping[str, Any], name: str, absent: int, most: int) -> int:
    value = config.get(name, absent)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not 1 <= value <= most or value != int(value):
        raise UserError(FIELD, f"its {name} must be a whole number from 1 to {most}, and is {_quoted(value)}")
    return int(value)


def _quoted(value: object) -> str:
    text = json.dumps(value)
    return one_line(text if len(text) <= 60 else f"{text[:60]}…")


def _unreadable(error: BaseException) -> Exception:
    if isinstance(error, OSError):
        return OutsideFailure(f"{FIELD}: {ADAPTER_FILE} can't be read: {error.strerror or first_line(error)}")
    return UserError(FIELD, f"its {ADAPTER_FILE} is no whole safetensors file ({first_line(error)})")
