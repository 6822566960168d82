"""Trains the tiny model of a family in every way that the documentation promises, and compares the results with those
of plain transformers. `python -m tests.trainer.family_matrix NAME...` writes the findings about the named families into
`family_results.json`. Without a name, all families are trained.

`docs/models.md` is made from that file, and `test_families.py` compares the file with new runs.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from finetune_core.contract.preflight_result import PreflightResult
from finetune_trainer.data.order import global_batch
from finetune_trainer.model.adapters import initial_adapter
from finetune_trainer.pod.plan import Inputs
from tests.trainer import tiny
from tests.trainer.families import FAMILIES, write_family
from tests.trainer.gangs import losses_of, run_plans, write_plans
from tests.trainer.objectstore import BUCKET, ObjectStore, minio_binary, running_store
from tests.trainer.plain_loop import PlainExample, plain_losses
from tests.trainer.pods import run_config, start_pods

RESULTS = Path(__file__).with_name("family_results.json")
STEPS = 4
RATE = 1e-3
TOLERANCE = 1e-5
"""Largest relative difference that is allowed between a loss of the trainer and that of the plain loop."""
LOGITS = 1e-4
"""Largest difference that is allowed between a logit of the model that is loaded from the artifact, and that of the
model of the plain loop."""
SECONDS = 240
TRAIN = tiny.rows(10, seed=1)
WAYS: Mapping[str, Sequence[Mapping[str, Any]]] = {
    "LoRA": (
        {"optimization__zeroStage": 2, "storage__artifact": "Both"},
        {"optimization__zeroStage": 3, "dataset__packing": True},
    ),
    "Full": (
        {"optimization__zeroStage": 3},
        {"optimization__zeroStage": 2, "dataset__packing": True},
    ),
}
"""The runs of each method on two ranks: padded first, then packed."""

Findings = dict[str, str]
"""What was found, by the name of a check. An empty text means that the check passed; other texts say what is wrong. The
entry `kernel` names the attention kernels of the runs."""


def examine(name: str, store: ObjectStore, folder: Path) -> Findings:
    """Return the findings about the family ``name``. ``folder`` is a new folder for files of the runs."""
    torch.set_num_threads(1)
    model = write_family(name, folder / "model")
    store.upload(f"models/{name}", model)
    (folder / "data").mkdir()
    tiny.write_jsonl(folder / "data" / "train.jsonl", TRAIN)
    store.upload("families/data", folder / "data")
    findings: Findings = {"preflight": _preflight(name, store, folder / "preflight")}
    for method in WAYS:
        findings |= _train(name, method, store, model, folder / method.lower())
    return findings


def _job(name: str, method: str, store: ObjectStore, run: str, changes: Mapping[str, Any]) -> dict[str, Any]:
    options: dict[str, Any] = {
        "dataset__train": {"s3": {"uri": f"s3://{BUCKET}/families/data/train.jsonl"}},
        "dataset__validation": None,
        "model": {"s3": {"uri": f"s3://{BUCKET}/models/{name}"}},
        "method": method,
        "optimization__maxSteps": STEPS,
        "optimization__learningRate": RATE,
        "storage__checkpointEverySteps": 2,
    }
    return run_config(store, _run_name(name, method, run), **options, **changes)


def _run_name(name: str, method: str, run: str) -> str:
    return f"{name}-{method}-{run}".lower().replace(".", "-")


def _preflight(name: str, store: ObjectStore, folder: Path) -> str:
    """Run the preflight check of a LoRA job, and return its findings as one text, which is empty without findings. If
    the check ends without a result, the text says that it crashed."""
    config = _job(name, "LoRA", store, "preflight", {"world__nodes": 1, "storage__artifact": "Both"})
    pods = start_pods(config, folder, credentials=store.credentials, arguments=("preflight",), forked=True)
    try:
        pods.wait(SECONDS)
        result = PreflightResult.from_termination_message(pods.pods[0].termination_log.read_text())
    finally:
        pods.end()
    if result is None:
        return "the preflight check crashed"
    return "; ".join(finding.message for finding in result.findings)


def _train(name: str, method: str, store: ObjectStore, model: Path, folder: Path) -> Findings:
    """Train the model in ``model`` with ``method`` three times: padded, packed, and padded with a stop and a resume.
    Compare the losses of the first two runs with those of a plain loop, and the artifact of the first run with that of
    the resumed run."""
    folder.mkdir()
    inputs = Inputs(model=model, train=tiny.write_jsonl(folder / "train.jsonl", TRAIN))
    padded, packed = WAYS[method]
    configs = [
        _job(name, method, store, "padded", padded),
        _job(name, method, store, "packed", packed),
        _job(name, method, store, "resumed", padded),
        _job(name, method, store, "resumed", padded),
    ]
    faults: list[dict[str, Any] | None] = [None, None, {"kind": "stop", "step": 3}, None]
    plans = write_plans(configs, inputs, folder, credentials=store.credentials, faults=faults)
    codes = run_plans(plans, folder, seconds=SECONDS)
    log = (folder / "rank-0.log").read_text()
    key = method.lower()
    if codes != [0, 0]:
        lines = [line for line in log.splitlines() if line.strip()]
        return {key: f"crashed: {lines[-1][:300] if lines else codes}"}
    outcomes = [
        "" if result["outcome"] == "Completed" else f"{result['message']}"
        for result in json.loads((folder / "rank-0" / "results-0.json").read_text())
    ]
    kernels = {line.removeprefix("attention: ") for line in log.splitlines() if line.startswith("attention: ")}
    findings: Findings = {key: outcomes[0], f"{key} packed": outcomes[1]}
    if outcomes[0]:
        return findings
    artifact = _download(store, _run_name(name, method, "padded"), folder / "artifact")
    examples = [_example(model, row) for row in TRAIN]
    plain = _plain_model(method, model, artifact)
    wanted = _plain_losses(plain, examples)
    findings["kernel"] = ", ".join(sorted(kernels))
    findings[key] = _difference(losses_of(store, _run_name(name, method, "padded")), wanted)
    if not outcomes[1]:
        findings[f"{key} packed"] = _difference(losses_of(store, _run_name(name, method, "packed")), wanted)
    resumed = _download(store, _run_name(name, method, "resumed"), folder / "resumed")
    findings[f"{key} resume"] = "" if _same_bytes(artifact, resumed) else "other bytes after a resume"
    findings |= _reloaded(name, method, model, artifact, plain, torch.tensor([examples[0].ids]))
    return findings


def _reloaded(name: str, method: str, base: Path, artifact: Path, plain: Any, ids: torch.Tensor) -> Findings:
    """Load the artifact with plain transformers and peft, and compare its logits with those of ``plain``, the model of
    the plain loop. Compare the names of the tensors in the merged or full model with those in ``base``."""
    loads: dict[str, Callable[[], Any]] = (
        {
            "adapter": lambda: PeftModel.from_pretrained(_loaded(base), artifact, autocast_adapter_dtype=False),
            "merged": lambda: _loaded(artifact / "merged"),
        }
        if method == "LoRA"
        else {"full model": lambda: _loaded(artifact)}
    )
    findings = {}
    with torch.no_grad():
        wanted = plain(input_ids=ids, use_cache=False).logits
        for kind, load in loads.items():
            try:
                found = load().eval()(input_ids=ids, use_cache=False).logits
                problem = "" if float((found - wanted).abs().max()) <= LOGITS else "other logits after a reload"
            except Exception as error:  # noqa: BLE001  (whatever transformers raises is the finding)
                problem = f"can't be loaded: {str(error).splitlines()[0][:200]}"
            findings[kind] = problem
    folder = artifact / "merged" if method == "LoRA" else artifact
    kind = "merged" if method == "LoRA" else "full model"
    lacking = _tensor_names(base) - _tensor_names(folder)
    foreign = _tensor_names(folder) - _tensor_names(base)
    if not findings[kind] and (lacking - FAMILIES[name].unused.keys() or foreign):
        findings[kind] = f"other tensor names than the base, such as {min(foreign or lacking)}"
    return findings


def _loaded(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def _tensor_names(folder: Path) -> set[str]:
    names: set[str] = set()
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            names |= set(tensors.keys())
    return names


def _plain_model(method: str, base: Path, artifact: Path) -> Any:
    """Return the model that a plain loop trains, as transformers and peft make it. For LoRA the model has the adapters
    that the configuration in ``artifact`` names, with the initial values that the documentation defines."""
    model = _loaded(base)
    model.config.get_text_config().use_cache = False
    if method == "Full":
        return model
    config = PeftConfig.from_pretrained(str(artifact))
    config.inference_mode = False
    tuned = get_peft_model(model, config, autocast_adapter_dtype=False)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(initial_adapter(name, parameter.shape, 42))
    return tuned.eval()


def _plain_losses(model: Any, examples: Sequence[PlainExample]) -> list[float]:
    """Train ``model`` in a plain loop that computes one example at a time, and return the loss of each step."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.0)
    batches = [global_batch(step, rows=len(examples), global_batch_size=6, seed=42) for step in range(1, STEPS + 1)]
    return plain_losses(model, optimizer, examples, batches)


def _example(folder: Path, row: Mapping[str, str]) -> PlainExample:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompt = tokenizer(tiny.TEMPLATE.replace("{prompt}", row["question"]))["input_ids"]
    answer = [*tokenizer(row["reply"], add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    return PlainExample([*prompt, *answer], [False] * len(prompt) + [True] * len(answer))


def _difference(found: Sequence[float], wanted: Sequence[float]) -> str:
    """Return what is wrong with the losses ``found``. The text is empty where they equal ``wanted``, up to
    TOLERANCE."""
    if len(found) != len(wanted):
        return f"{len(found)} steps instead of {len(wanted)}"
    if all(abs(one - other) <= TOLERANCE * abs(other) for one, other in zip(found, wanted, strict=True)):
        return ""
    return "other losses than a plain loop"


def _same_bytes(one: Path, other: Path) -> bool:
    files = sorted(path.relative_to(one) for path in one.rglob("*.safetensors"))
    return all((one / file).read_bytes() == (other / file).read_bytes() for file in files)


def _download(store: ObjectStore, name: str, target: Path) -> Path:
    root = f"runs/default/{name}/uid-1"
    folder = f"{root}/{json.loads(store.read(f'{root}/ARTIFACT'))['folder']}"
    for key in store.keys(f"{folder}/"):
        path = target / key.removeprefix(f"{folder}/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(store.read(key))
    return target


def stored_results() -> dict[str, Findings]:
    """Return the findings in `family_results.json`, by family."""
    return dict(json.loads(RESULTS.read_text())) if RESULTS.is_file() else {}


def main() -> None:
    names = sys.argv[1:] or list(FAMILIES)
    binary = minio_binary()
    assert binary is not None, "no MinIO program: set FINETUNE_MINIO"
    with tempfile.TemporaryDirectory() as folder, running_store(binary, Path(folder)) as store:
        for name in names:
            work = Path(folder) / f"work-{name}"
            work.mkdir()
            findings = examine(name, store, work)
            print(name, {key: value for key, value in findings.items() if value}, flush=True)
            results = stored_results() | {name: findings}
            RESULTS.write_text(json.dumps(dict(sorted(results.items())), indent=1) + "\n")


if __name__ == "__main__":
    main()
