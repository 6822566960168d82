"""Golden-file tests: every example job renders to the PyTorchJob stored in tests/operator/golden/examples.

`test_pytorchjob.py` has the golden file of the quickstart. After an intended change,
`python -m tests.operator.test_examples` writes the golden files anew.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from finetune_core.api import FineTuneJob
from finetune_core.names import attempt_name
from finetune_operator.objects.backends.pytorchjob import build_pytorchjob
from finetune_operator.objects.pod_template import AttemptSpec
from tests.operator.builders import REPOSITORY, UID

GOLDEN = Path(__file__).parent / "golden"
EXAMPLES = sorted(path for path in (REPOSITORY / "examples").rglob("*.yaml") if path.name != "quickstart.yaml")
SIZES = ("7b-lora", "7b-full", "13b-lora", "13b-full", "70b-lora")
TASKS = ("viggo", "gsm8k", "sql")


def rendered(path: Path) -> str:
    """Return the PyTorchJob of attempt 1 of the example at ``path``, as YAML text."""
    manifest = yaml.safe_load(path.read_text(encoding="utf-8"))
    manifest["metadata"] |= {"namespace": "team", "uid": UID, "generation": 1, "resourceVersion": "1"}
    job = FineTuneJob.model_validate(manifest)
    attempt = AttemptSpec(
        number=1,
        name=attempt_name(job.metadata.name, UID, 1),
        image="trainer:1",
        report_base_url="https://operator:8443",
    )
    return yaml.safe_dump(build_pytorchjob(job, attempt), sort_keys=False, width=100)


def golden(path: Path) -> Path:
    """Return the path of the golden file for the example at ``path``."""
    return GOLDEN / "examples" / path.name


def test_the_study_is_complete() -> None:
    names = {path.stem for path in EXAMPLES}
    assert {f"{size}-{task}" for size in SIZES for task in TASKS} | {"quickstart-full"} <= names


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_renders_as_stored(path: Path) -> None:
    assert rendered(path) == golden(path).read_text(encoding="utf-8")


if __name__ == "__main__":
    for example in EXAMPLES:
        golden(example).parent.mkdir(exist_ok=True)
        golden(example).write_text(rendered(example), encoding="utf-8")
