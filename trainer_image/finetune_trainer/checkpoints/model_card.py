"""Makes the model card of an artifact: a README.md that says from which model and data the artifact was made, with
which settings, and with which scores.

`finish.py` writes the card. The card begins with the YAML header that the Hugging Face Hub reads. Names that users or
other programs chose appear in the card as plain text: no name can add markup, a link or a field of the header.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import peft
import torch
import transformers
from huggingface_hub import ModelCardData

from finetune_core.api.sources import DataSource, ModelSpec
from finetune_core.contract import AdapterOrigin, EvaluationRecord, Identity, RunConfig, ScoreRecord
from finetune_core.task_declaration import ALL_TOKENS_LABEL, ALL_TOKENS_MEANING
from finetune_trainer.pod.errors import one_line
from finetune_trainer.sources.inputs import source_name

NAME_LENGTH = 300
"""Longest name in a card, in characters. A longer name is cut off."""
LEFT_OUT = {"overrides", "offload_optimizer", "offload_parameters"}
"""Fields of `optimization` that a card does not show. The settings for offloading don't change what is trained, and
`overrides` is free text."""


@dataclass(frozen=True)
class CardFacts:
    """What a model card says in addition to the run file."""

    identity: Identity
    base_revision: str | None
    """Commit, tag or branch of the base model on the Hugging Face Hub. None where the base model lies elsewhere."""
    base_sha256: str | None
    """sha256 of the base model's weights. None where it is not known."""
    data_sha256: str
    """sha256 of the training rows after they were tokenised."""
    examples: int
    """Number of training examples."""
    step: int
    """Optimizer step of the exported checkpoint."""
    evaluation: EvaluationRecord | None
    """Scores of base model and tuned model. None where no model was scored."""
    origin: AdapterOrigin | None = None
    """The adapter that the training started from. None without one."""


def model_card(config: RunConfig, facts: CardFacts, form: Literal["adapter", "model"]) -> str:
    """Return the text of README.md for an artifact in the given ``form``."""
    hub_base = config.model.hugging_face
    datasets = [source.hugging_face.repo for source in config.dataset.sources.values() if source.hugging_face]
    header = ModelCardData(
        base_model=hub_base.repo if hub_base is not None else None,
        base_model_relation=("adapter" if form == "adapter" else "finetune") if hub_base is not None else None,
        datasets=sorted(set(datasets)) or None,
        library_name="peft" if form == "adapter" else "transformers",
        pipeline_tag="text-generation",
        tags=["lora" if config.lora is not None else "full-fine-tuning", "finetune-operator"],
    )
    return f"---\n{header.to_yaml()}\n---\n\n" + "\n".join(_body(config, facts, form)) + "\n"


def _body(config: RunConfig, facts: CardFacts, form: str) -> Iterator[str]:
    identity, sources = facts.identity, config.dataset.sources
    what = "An adapter for a base model" if form == "adapter" else "A language model"
    yield from (
        f"# {_text(identity.name)}",
        "",
        f"{what}, trained by finetune-operator. ",
        "",
    )
    yield from ("## Base model", "", f"- Name: {code(_source(config.model))}")
    for label, value in (("Revision", facts.base_revision), ("sha256 of its weights", facts.base_sha256)):
        if value is not None:
            yield f"- {label}: {code(value)}"
    if config.model.added_tokens:
        yield f"- Tokens that the job added: {', '.join(code(token) for token in config.model.added_tokens)}"
    if facts.origin is not None:
        yield from _origin(facts.origin)
    yield from ("", "The licence of the base model and those of the data also hold for this model.", "")
    yield from ("## Data", "")
    for field, source in sources.items():
        hub = source.hugging_face
        revision = f", revision {code(hub.revision)}" if hub is not None and hub.revision is not None else ""
        yield f"- `{field}`: {code(_source(source))}{revision}"
    yield from (
        f"- Training examples: {facts.examples}",
        f"- sha256 of the training rows: {code(facts.data_sha256)}",
        "",
    )
    yield from ("## Training", "", f"- method: `{config.method.value}`")
    settings: dict[str, Any] = {}
    if config.lora is not None:
        settings |= {f"lora.{key}": value for key, value in _fields(config.lora).items()}
    settings |= _fields(config.optimization, LEFT_OUT)
    settings |= {"maxLength": config.dataset.max_length, "packing": config.dataset.packing}
    settings["processes"] = config.world.size
    yield from (f"- {name}: {_value(value)}" for name, value in settings.items())
    if config.optimization.overrides is not None:
        yield "- The job also changes settings of DeepSpeed."
    yield from ("", "## Scores", "", *_scores(facts.evaluation), "", "## Job", "")
    yield f"- Job: `{_text(identity.namespace)}/{_text(identity.name)}`, uid {code(identity.uid)}"
    yield f"- Runs: {code(_without_password(config.storage.uri))}, attempt {identity.attempt}"
    yield f"- The artifact is the model of optimizer step {facts.step}."
    versions = {"torch": torch.__version__, "transformers": transformers.__version__, "peft": peft.__version__}
    yield "- Libraries: " + ", ".join(f"{name} {version}" for name, version in versions.items())


def _origin(origin: AdapterOrigin) -> Iterator[str]:
    sentence = "The training continued an adapter."
    if origin.use == "Merge":
        sentence = "An adapter was merged into the base model first."
    yield from ("", "## Initial adapter", "", sentence, "", f"- Name: {code(_without_password(origin.source))}")
    facts = (("Revision", origin.revision), ("uid of its job", origin.job_uid), ("sha256 of its files", origin.sha256))
    for label, value in facts:
        if value is not None:
            yield f"- {label}: {code(value)}"


def _fields(settings: Any, left_out: set[str] | None = None) -> Mapping[str, Any]:
    """Return the fields of ``settings``, a section of the run file, without those that are None or empty and those in
    ``left_out``. A field that the section gets later appears in the card without a change of this module."""
    values: Mapping[str, Any] = settings.model_dump(mode="json", by_alias=True, exclude_none=True, exclude=left_out)
    return {name: value for name, value in values.items() if value not in ([], {})}


def _scores(evaluation: EvaluationRecord | None) -> Sequence[str]:
    if evaluation is None or evaluation.tuned is None:
        return ["No model was scored."]
    base, tuned = evaluation.base, evaluation.tuned
    lines = [f"On {evaluation.examples} {evaluation.rows} rows:", ""]
    for name, value in _score_values(tuned).items():
        before = _score_values(base).get(name) if base is not None else None
        lines.append(f"- {code(name)}: {value:.6g}" + (f" (base model: {before:.6g})" if before is not None else ""))
    if tuned.all_token_perplexity is not None:
        lines += ["", ALL_TOKENS_MEANING]
    return lines


def _score_values(record: ScoreRecord) -> dict[str, float]:
    values = {"perplexity": record.perplexity, ALL_TOKENS_LABEL: record.all_token_perplexity, **record.scores}
    return {name: value for name, value in values.items() if value is not None}


def _source(source: ModelSpec | DataSource) -> str:
    return _without_password(source_name(source))


def _without_password(address: str) -> str:
    """Return ``address`` without a user and a password before the host."""
    return re.sub(r"^([A-Za-z][A-Za-z0-9+.-]*://)[^/@]*@", r"\1", address)


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(_value(item) for item in value)
    return code(str(value)) if isinstance(value, str) else str(value)


def _text(name: str) -> str:
    """Return ``name``, the name of a Kubernetes object, with `?` in place of each character that is no ASCII letter, no
    digit, no dot and no hyphen. A valid name has no such character. What is left has no meaning in Markdown."""
    return re.sub(r"[^A-Za-z0-9.-]", "?", name)


def code(text: str) -> str:
    """Return ``text`` as a code span of Markdown on one line. Markup and HTML have no effect in a code span."""
    line = one_line(text, limit=NAME_LENGTH)
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", line)), default=0))
    pad = " " if line.startswith("`") or line.endswith("`") or not line else ""
    return f"{fence}{pad}{line}{pad}{fence}"
