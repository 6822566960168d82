"""`finetune validate` reads a YAML file as kubectl does: numbers, booleans, nulls, anchors and merges get the same
values.
"""

from __future__ import annotations

import json

import pytest

from finetune_cli.jobfiles.yaml_lines import load
from tests.api.server import Server
from tests.cluster import Cluster

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(120)]

HEAD = "apiVersion: finetune.dev/v1alpha1\nkind: FineTuneJob\nmetadata: {name: a}\nspec:\n"
SCALARS = [
    *("y", "n", "yes", "no", "on", "off", "Yes", "OFF", "true", "False", "TRUE", "~", "null", "Null", "nULL"),
    *("1", "-1", "+1", "0", "007", "0777", "0o17", "0x1F", "0b101", "1_000", "9223372036854775807", "08", "09"),
    *("2.0", "2.5", "1e3", "1e-4", "1E+2", ".5", "5.", "-.5", "1.e3", "0.10", "-0", "+.5"),
    *(
        "2026-11-24",
        "2026-11-24T02:00:00Z",
        "12:30",
        "1:2:3",
        "1.2.3",
        "abc",
        "a:b",
        "1e400x",
        "0x",
        "1e",
        "_1",
        "1__0",
    ),
    *('"1"', "'1'", '"yes"', "!!str 1", "="),
]
BLOCKS = [
    "  a: &x {b: 1, c: 2}\n  d: {<<: *x, c: 3}\n",
    "  a: &x {b: 1}\n  e: &y {c: 2, b: 9}\n  d: {<<: [*x, *y]}\n",
    "  a: &x [1, two]\n  b: *x\n",
    "  1: a\n  2.5: b\n  true: c\n",
    "  a: |\n    text\n    more\n  b: >-\n    folded\n    line\n",
    "  a:\n  b: ''\n  c: {}\n  d: []\n",
    '  a: "\\u00fc\\n\\x41"\n  b: üñ\n',
    "  - a\n  - [b, {c: d}]\n",
]


@pytest.mark.parametrize("block", [*BLOCKS, "".join(f"  k{n}: {text}\n" for n, text in enumerate(SCALARS))])
def test_the_same_values(cluster: Cluster, server: Server, block: str) -> None:
    text = HEAD + block
    kubectl = cluster.layout.programs / "kubectl"
    done = cluster.run(
        [kubectl, "create", "--dry-run=client", "--validate=false", "--output=json", "-f", "-"], stdin=text
    )
    (document,), broken = load(text)
    assert (document.problems, broken) == ([], [])
    assert json.loads(json.dumps(document.value["spec"])) == json.loads(done.stdout)["spec"]
