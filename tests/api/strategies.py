"""Hypothesis strategies that generate valid jobs from the OpenAPI schema, and the list of the places in a job that can
be mutated.

Types, bounds, patterns, enums, unions and unique lists come from the schema. Random values almost never satisfy the CEL
rules. So `_CHOSEN` has strategies for some fields, `_agree_locally` makes the fields of a section fit together, and
`_agree` makes sections fit together.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from typing import Any

from hypothesis import strategies as st

from finetune_core.api.pod_template import RESERVED_FOLDERS
from finetune_core.api.schema import openapi_schema
from finetune_core.api.spec import FineTuneJobSpec
from finetune_core.validation.cel_rules import holds
from finetune_core.validation.defaults import defaulted

Schema = dict[str, Any]
SchemaPath = tuple[str, ...]
"""Path of a place in the spec: the keys below `spec`. The part `[]` means an item of a list, and the part `*` means a
value of a map."""

SPEC: Schema = openapi_schema(FineTuneJobSpec)

_UNION = re.compile(r"^\[(?P<members>[^]]+)\]\.filter\(set, set\)\.size\(\) (?P<how>==|<=) 1$")
_LABEL_KEYS = st.from_regex(
    r"([a-z][a-z0-9]{0,8}\.[a-z]{2,5}/)?[A-Za-z0-9]([-._A-Za-z0-9]{0,12}[A-Za-z0-9])?", fullmatch=True
)
_RATES = st.sampled_from(["1e-4", "5e-6", "1", "0.25", "3E-05", "1.0e-0", "0.00001"])
_WORDS = st.text(max_size=12).map(lambda text: text.replace("{", "{{").replace("}", "}}"))
_TEMPLATES = st.tuples(_WORDS, st.sampled_from(["{prompt}", "{#a b}{prompt}{/a b}", "{^x}-{/x}{é}"]), _WORDS).map(
    "".join
)
_FOLDERS = st.from_regex(r"(/[A-Za-z0-9_][-._A-Za-z0-9]{0,8}){1,3}", fullmatch=True).filter(
    lambda path: not any(path == own or path.startswith(f"{own}/") for own in RESERVED_FOLDERS)
)
_DEVICES = st.dictionaries(
    st.sampled_from(["rdma/ib", "vpc.amazonaws.com/efa", "deviceclass.resource.kubernetes.io/nic"]),
    st.one_of(st.integers(1, 9999), st.sampled_from(["1", "9999"])),
    min_size=1,
)
_HUGE_PAGES = st.dictionaries(
    st.sampled_from(["hugepages-2Mi", "hugepages-1Gi"]), st.sampled_from(["4Mi", "9999999Gi"])
)
_CHOSEN: dict[SchemaPath, st.SearchStrategy[Any]] = {
    ("resources", "extended"): st.builds(lambda devices, pages: devices | pages, _DEVICES, _HUGE_PAGES),
    ("training", "learningRate"): _RATES,
    ("lora", "dropout"): st.sampled_from(["0", "0.05", "5e-2", "0.999"]),
    ("lora", "loraPlusRatio"): st.sampled_from(["1", "16", "2.5", "1e1"]),
    ("dataset", "format", "promptCompletion", "template"): _TEMPLATES,
    ("dataset", "format", "promptCompletion", "completion"): _TEMPLATES,
    ("evaluation", "basePrompt"): _TEMPLATES,
    ("podTemplate", "volumes", "[]", "mountPath"): _FOLDERS,
}


def jobs(force: SchemaPath = ()) -> st.SearchStrategy[dict[str, Any]]:
    """Return a strategy that generates specs that the API server and the models accept. Where the path ``force`` is
    given, each spec has a value at this path."""
    return _of(SPEC, (), force).map(lambda spec: _agree(copy.deepcopy(spec), force))


def leaves(schema: Schema = SPEC, path: SchemaPath = ()) -> Iterator[tuple[SchemaPath, Schema]]:
    """Yield the path and the schema of every place in ``schema``: fields, sections, lists, list items and map values.
    ``path`` is the path of ``schema`` itself, which is yielded too unless it is the whole spec (an empty path)."""
    if path:
        yield path, schema
    for name, child in schema.get("properties", {}).items():
        yield from leaves(child, (*path, name))
    if schema.get("type") == "array":
        yield from leaves(schema["items"], (*path, "[]"))
    if isinstance(schema.get("additionalProperties"), dict):
        yield from leaves(schema["additionalProperties"], (*path, "*"))


def _of(schema: Schema, path: SchemaPath, force: SchemaPath) -> st.SearchStrategy[Any]:
    if path in _CHOSEN:
        return _CHOSEN[path]
    if "enum" in schema:
        return st.sampled_from(schema["enum"])
    if schema.get("x-kubernetes-int-or-string"):
        return st.one_of(st.integers(schema["minimum"], schema["maximum"]), _text(schema))
    kind = schema["type"]
    if kind == "integer":
        return st.integers(schema["minimum"], schema["maximum"])
    if kind == "boolean":
        return st.booleans()
    if kind == "string":
        return _text(schema)
    if kind == "array":
        return _list(schema, path, force)
    if "additionalProperties" in schema:
        least = 1 if force[:1] == ("*",) else 0
        values = _of(schema["additionalProperties"], (*path, "*"), force[1:])
        return st.dictionaries(_LABEL_KEYS, values, min_size=least, max_size=min(3, schema["maxProperties"]))
    return _object(schema, path, force)


def _text(schema: Schema) -> st.SearchStrategy[str]:
    longest = schema["maxLength"]
    if "pattern" in schema:
        # The annotation is for the type checker, which can't know that the pattern is text, because the schema is JSON.
        pattern: str = schema["pattern"]
        return st.from_regex(pattern, fullmatch=True).filter(
            lambda text: (
                schema.get("minLength", 0) <= len(text) <= longest and all(holds(rule, text) for rule in _rules(schema))
            )
        )
    least = schema.get("minLength", 0)
    edge = st.sampled_from([longest, least]).map(lambda size: "é" * size)
    return st.one_of(st.text(min_size=least, max_size=min(20, longest)), edge)


def _list(schema: Schema, path: SchemaPath, force: SchemaPath) -> st.SearchStrategy[list[Any]]:
    forced = force[:1] == ("[]",)
    items = _of(schema["items"], (*path, "[]"), force[1:] if forced else ())
    least = max(schema.get("minItems", 0), int(forced))
    kind = schema.get("x-kubernetes-list-type", "atomic")
    unique = {"set": lambda item: item, "map": lambda item: item["name"]}.get(kind)
    return st.lists(items, min_size=least, max_size=max(least, min(3, schema["maxItems"])), unique_by=unique)


def _object(schema: Schema, path: SchemaPath, force: SchemaPath) -> st.SearchStrategy[dict[str, Any]]:
    properties = schema.get("properties", {})

    def below(name: str) -> st.SearchStrategy[Any]:
        return _of(properties[name], (*path, name), force[1:] if force[:1] == (name,) else ())

    unions = [match for rule in _rules(schema) if (match := _UNION.match(rule))]
    members = {match: re.findall(r"self\.(\w+)", match["members"]) for match in unions}
    in_union = {name for names in members.values() for name in names}
    needed = {*schema.get("required", ()), *(force[:1] if force else ())} - in_union
    free = st.fixed_dictionaries(
        {name: below(name) for name in properties if name in needed},
        optional={name: below(name) for name in properties if name not in needed | in_union},
    )
    parts = [free]
    for match, names in members.items():
        choices = [name for name in names if name in force[:1]] or list(names)
        chosen = [st.fixed_dictionaries({name: below(name)}) for name in choices]
        if match["how"] == "<=" and force[:1] not in [(name,) for name in names]:
            chosen.append(st.just({}))
        parts.append(st.one_of(chosen))
    whole = st.tuples(*parts).map(lambda found: {key: value for part in found for key, value in part.items()})
    local = [rule for rule in _rules(schema) if not _UNION.match(rule) and "oldSelf" not in rule]
    if not local or not path:
        return whole
    return whole.map(lambda value: _agree_locally(path, value, force)).filter(
        lambda value: all(holds(rule, defaulted(schema, value)) for rule in local)
    )


def _rules(schema: Schema) -> list[str]:
    return [rule["rule"] for rule in schema.get("x-kubernetes-validations", ())]


def _agree_locally(path: SchemaPath, value: dict[str, Any], force: SchemaPath) -> dict[str, Any]:
    """Return the section ``value``, which is at ``path`` in the spec, with some fields changed, so that the section
    satisfies its own CEL rules. ``force`` is a path below the section. The section keeps its field at ``force``, whose
    value may change."""
    value = dict(value)
    if path == ("training",):
        if "maxSteps" in value:
            value["warmupSteps"] = min(value.get("warmupSteps", 0), value["maxSteps"])
        if "microBatchSize" in value:
            value["globalBatchSize"] = max(value["globalBatchSize"], value["microBatchSize"])
    if path == ("dataset",) and "task" in value and "promptCompletion" not in value["format"]:
        value["format"] = {"promptCompletion": {}} if force[:1] != ("format",) else value["format"]
        if force[:1] == ("format",):
            value.pop("task")
    if path == ("dataset",) and "task" in value and "test" not in value:
        value.setdefault("validation", _without_mix(value["train"]))
    if path == ("dataset",) and "text" not in value["format"] and value.get("longRows") in ("Split", "Truncate"):
        value["longRows"] = "Skip"
    if path == ("dataset", "task"):
        value = _agreeing_task(value, force)
    if path == ("evaluation", "require", "[]") and not {"atLeast", "atMost"} & value.keys():
        value["betterThanBase"] = True
    if path == ("dataset", "train") and any("weight" in part for part in value.get("mix", ())):
        value["mix"] = [{"weight": "1", **part} for part in value["mix"]]
    if path[-1] == "huggingFace" and "subset" in value and "path" in value:
        if force[:1] == ("subset",):
            value.pop("path")
            value["split"] = "train"
        else:
            value.pop("subset")
    if path == ("evaluation",) and "minDelta" in value:
        value.setdefault("patience", 1)
    if path == ("deepspeed",) and "CPU" in (value.get("offloadOptimizer"), value.get("offloadParameters")):
        value["zeroStage"] = 3
    if path == ("deepspeed",) and value.get("zeroStage") == "None" and "overrides" in value:
        if force[:1] == ("overrides",):
            value["zeroStage"] = "Auto"
        else:
            value.pop("overrides")
    if path[-1:] == ("tolerations",) or path[-2:] == ("tolerations", "[]"):
        if "key" not in value:
            value["operator"] = "Exists"
        if "value" in value:
            value |= {"operator": "Equal", "key": value.get("key", "dedicated")}
        if "tolerationSeconds" in value:
            value["effect"] = "NoExecute"
    if path[-2:] == ("matchExpressions", "[]"):
        if force[:1] == ("values",):
            value["operator"] = "In"
        if value["operator"] in ("Exists", "DoesNotExist"):
            value.pop("values", None)
        else:
            value["values"] = value.get("values", ["1"])[: 1 if value["operator"] in ("Gt", "Lt") else None]
    return value


_ARGUMENTS = {
    "ExactMatch": ("ignore",),
    "Contains": ("ignore",),
    "Regex": ("ignore", "pattern"),
    "Number": ("tolerance", "relativeTolerance", "marker"),
}
_TASK_ARGUMENTS = {field for fields in _ARGUMENTS.values() for field in fields}


def _agreeing_task(value: dict[str, Any], force: SchemaPath) -> dict[str, Any]:
    """Return ``value``, the section `dataset.task`, without the fields that its task does not take. If
    ``force``, a path below the section, leads to a field that only some tasks take, one of these tasks is set first."""
    if force[:1] == ("arguments",):
        return {"entryPoint": "own"} | {
            name: value[name] for name in ("fields", "arguments", "oneLine") if name in value
        }
    if (
        name := next((task for task, fields in _ARGUMENTS.items() if force[:1] and force[0] in fields), None)
    ) is not None:
        value = {key: inner for key, inner in value.items() if key != "entryPoint"} | {"name": name}
    if "entryPoint" in value:
        return {key: inner for key, inner in value.items() if key not in _TASK_ARGUMENTS}
    allowed = _ARGUMENTS.get(value["name"], ())
    value = {key: inner for key, inner in value.items() if key not in {*_TASK_ARGUMENTS, "arguments"} - {*allowed}}
    if value["name"] == "Regex":
        value.setdefault("pattern", "a")
    if "fields" in value:
        column = "mr" if value["name"] == "ViGGO" else "answer"
        value["fields"] = {column: next(iter(value["fields"].values()), "answer")}
    return value


def _agree(spec: dict[str, Any], force: SchemaPath) -> dict[str, Any]:
    """Change sections of ``spec`` so that they satisfy the CEL rules between sections, and return ``spec``. The field
    at the path ``force`` is kept."""
    training, evaluation = spec["training"], spec.get("evaluation", {})
    continues = spec["model"].get("adapter", {}).get("use") == "Continue"
    if continues or "lora" in spec or "artifact" in spec["storage"]:
        spec["method"] = "LoRA"
    if "quantization" in spec.get("lora", {}):
        if force[:1] != ("deepspeed",):
            spec.pop("deepspeed", None)
        elif spec["deepspeed"].get("zeroStage") in (0, 3):
            spec["lora"].pop("quantization")
        if "artifact" in spec["storage"]:
            spec["storage"]["artifact"] = "Adapter"
    if "cache" in spec["storage"] and "volume" in spec["model"]:
        if force[:2] == ("model", "volume"):
            del spec["storage"]["cache"]
        else:
            others = {name: value for name, value in spec["model"].items() if name != "volume"}
            spec["model"] = others | {"s3": {"uri": "s3://bucket/model"}}
    if spec.get("deepspeed", {}).get("zeroStage") == 0:
        training["precision"] = "fp32"
    if spec.get("deepspeed", {}).get("zeroStage") == "None":
        if force[:2] == ("deepspeed", "zeroStage"):
            resources = spec.setdefault("resources", {})
            resources |= {"nodes": 1, "gpusPerNode": min(1, resources.get("gpusPerNode", 1))}
        else:
            spec["deepspeed"]["zeroStage"] = "Auto"
    if {"patience", "minDelta"} & evaluation.keys() or evaluation.get("artifactFrom") == "Best":
        spec["dataset"].setdefault("validation", _without_mix(spec["dataset"]["train"]))
    graded = {"generation", "basePrompt"} & evaluation.keys() or evaluation.get("bestBy") == "TaskScore"
    if graded and force[:2] != ("dataset", "format"):
        spec["dataset"].setdefault("validation", _without_mix(spec["dataset"]["train"]))
        if "task" not in spec["dataset"]:
            spec["dataset"] |= {"task": {"name": "SQL"}, "format": {"promptCompletion": {}}}
        if spec["dataset"].get("longRows") in ("Split", "Truncate"):
            spec["dataset"]["longRows"] = "Skip"
    elif graded:
        spec["dataset"].pop("task", None)
        for name in ("generation", "basePrompt", "bestBy"):
            evaluation.pop(name, None)
    if "require" in evaluation:
        spec["dataset"].setdefault("validation", _without_mix(spec["dataset"]["train"]))
        for required in evaluation["require"]:
            required["score"] = "perplexity"
    if "gradientAccumulationSteps" in training:
        _accumulate(spec)
    return spec


def _without_mix(train: dict[str, Any]) -> dict[str, Any]:
    """Return ``train``, the source of the training rows. If it is a mix, return its first source without the weight."""
    source = train["mix"][0] if "mix" in train else train
    return {name: value for name, value in source.items() if name != "weight"}


def _accumulate(spec: dict[str, Any]) -> None:
    """Set the global batch size to micro-batch size x processes x accumulation steps, as the CEL rule demands. Before
    that, lower accumulation steps and micro-batch size so that the product is at most 65536. If the spec has no
    micro-batch size, round the global batch size to a multiple of processes x accumulation steps: down, but never to
    0."""
    training, resources = spec["training"], spec.get("resources", {})
    processes = resources.get("nodes", 1) * max(1, resources.get("gpusPerNode", 1))
    training["gradientAccumulationSteps"] = min(training["gradientAccumulationSteps"], 65536 // processes)
    share = processes * training["gradientAccumulationSteps"]
    if "microBatchSize" in training:
        training["microBatchSize"] = min(training["microBatchSize"], 65536 // share)
    training["globalBatchSize"] = share * training.get("microBatchSize", max(1, training["globalBatchSize"] // share))


PLACES_WITH_FIELDS: list[SchemaPath] = [path for path, _ in leaves() if path[-1] not in ("[]", "*")]
"""Paths of all places that are fields of a section. Items of lists and values of maps are left out."""
