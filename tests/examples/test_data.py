"""Each job in examples/data is valid. A job whose comment shows a row can read rows such as this one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from finetune_cli.main import main
from finetune_core.api import FineTuneJob
from finetune_core.row_templates import parse
from tests.trainer.chat import byte_tokenizer, learned, published, rendered

FOLDER = Path(__file__).parents[2] / "examples" / "data"
RENDERED = {
    "prompt-completion": ("Sentence: The mill is open.\nMeaning:", " open(mill)"),
    "alpaca": ("### Instruction:\nAdd the numbers.\n\n### Input:\n1 and 2\n\n### Response:\n", "3"),
    "columns": ("Prime numbers\nIs 91 prime?\n", "91 = 7 * 13\nAnswer: false"),
}
CONVERSATIONS = {
    "sharegpt": [["<think>\n\n</think>\n\nNo.<|im_end|>"]],
    "sharegpt-tools": [
        ['<think>\n\n</think>\n\n<tool_call>\n{"name": "factors", "arguments": {"n": 91}}\n</tool_call><|im_end|>'],
        ["<think>\n\n</think>\n\nNo, it is 7 * 13.<|im_end|>"],
    ],
    "conversations": [
        ['<tool_call>\n{"name": "factors", "arguments": {"n": 91}}\n</tool_call><|im_end|>'],
        ["No, it is 7 * 13.<|im_end|>"],
    ],
}
"""The texts that are learned from the conversation in the comment of a job file, by the name of the file. The
conversation is rendered by Qwen3's chat template and becomes one or more examples, and each example has a list of
learned texts."""


def row_in_comment(path: Path) -> dict[str, Any]:
    """Return the row that the comment of the job at ``path`` shows."""
    (line,) = (line for line in path.read_text().splitlines() if line.startswith("# Rows: {"))
    row: dict[str, Any] = json.loads(line.removeprefix("# Rows: "))
    return row


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.yaml")), ids=lambda path: path.stem)
def test_a_job_is_valid_and_says_in_one_line_what_its_rows_are(path: Path) -> None:
    assert main(["validate", str(path)]) == 0
    (line,) = (line for line in path.read_text().splitlines() if line.strip().startswith("format:"))
    assert yaml.safe_load(line.strip())["format"] == yaml.safe_load(path.read_text())["spec"]["dataset"]["format"]


@pytest.mark.parametrize(
    ("name", "right", "wrong", "sentence"),
    [
        ("alpaca", "{/input}", "", "template: must close each optional part: there is no `{/input}`"),
        ("prompt-completion", "{promptCompletion: {}}", '{promptCompletion: {template: "{{prompt}}"}}', "must hold a"),
        ("sharegpt", "messagesField", "messageField", "unknown field; did you mean `messagesField`?"),
        ("sharegpt", "conversations}", "tools}", "`messagesField` and `toolsField` must differ"),
    ],
)
def test_a_mistake_in_that_line_is_named(
    name: str, right: str, wrong: str, sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (FOLDER / f"{name}.yaml").read_text()
    (line,) = (line for line in text.splitlines() if line.strip().startswith("format:"))
    assert right in line
    path = tmp_path / "job.yaml"
    path.write_text(text.replace(line, line.replace(right, wrong)))
    assert main(["validate", str(path)]) == 1
    assert f"job.yaml:{1 + text.splitlines().index(line)}: spec.dataset.format" in (said := capsys.readouterr().out)
    assert sentence in said


@pytest.mark.parametrize("name", RENDERED)
def test_the_row_of_the_comment_becomes_prompt_and_completion(name: str) -> None:
    path = FOLDER / f"{name}.yaml"
    job = FineTuneJob.model_validate(
        yaml.safe_load(path.read_text()) | {"metadata": {"name": name, "namespace": "a", "uid": "b"}}
    )
    form, row = job.spec.dataset.format.prompt_completion, row_in_comment(path)
    assert form is not None
    texts = (form.template, form.completion or "{completion}")
    found = tuple("".join(piece.text for piece in parse(text, form.aliases).pieces(row)) for text in texts)
    assert found == RENDERED[name]


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_the_conversation_of_the_comment_is_learned(name: str) -> None:
    path = FOLDER / f"{name}.yaml"
    form = yaml.safe_load(path.read_text())["spec"]["dataset"]["format"]["messages"]
    tokenizer = byte_tokenizer(published("qwen3"))
    assert learned(tokenizer, rendered(tokenizer, row_in_comment(path), **form)) == CONVERSATIONS[name]
