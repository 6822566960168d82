"""Generates the CustomResourceDefinition (a structural OpenAPI 3.0 schema) from the pydantic models.

`make crds` runs this program and writes the CRD into crds/ and into the Helm chart. tests/core/test_crd.py checks that
the committed file in crds/ is the one that the models generate.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import yaml

from finetune_core.api.base import cel
from finetune_core.api.job import (
    GROUP,
    KIND,
    NAME_RULE,
    OTHER_JOB_RULE,
    PLURAL,
    SHORT_NAME,
    SINGULAR,
    VERSION,
    FineTuneJob,
    printer_columns,
)
from finetune_core.api.older_specs import OTHER_TYPES
from finetune_core.api.schema import openapi_schema
from finetune_core.api.spec import FineTuneJobSpec
from finetune_core.api.status import NOT_OBSERVED, FineTuneJobStatus
from finetune_core.api.tolerant_rules import tolerate_other_types

CRD_FILE = f"{GROUP}_{PLURAL}.yaml"


def custom_resource_definition() -> dict[str, Any]:
    """Return the manifest of the CustomResourceDefinition."""
    root = {
        "type": "object",
        "description": " ".join((FineTuneJob.__doc__ or "").split()),
        "required": ["spec"],
        "properties": {
            "apiVersion": {"type": "string"},
            "kind": {"type": "string"},
            "metadata": {"type": "object"},
            "spec": tolerate_other_types(openapi_schema(FineTuneJobSpec), OTHER_TYPES),
            "status": openapi_schema(FineTuneJobStatus) | {"default": {"observedGeneration": NOT_OBSERVED}},
        },
        **cel(NAME_RULE, OTHER_JOB_RULE),
    }
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": f"{PLURAL}.{GROUP}"},
        "spec": {
            "group": GROUP,
            "scope": "Namespaced",
            "names": {
                "kind": KIND,
                "listKind": f"{KIND}List",
                "plural": PLURAL,
                "singular": SINGULAR,
                "shortNames": [SHORT_NAME],
                "categories": ["all"],
            },
            "versions": [
                {
                    "name": VERSION,
                    "served": True,
                    "storage": True,
                    "subresources": {"status": {}},
                    "additionalPrinterColumns": printer_columns(),
                    "schema": {"openAPIV3Schema": root},
                }
            ],
        },
    }


def crd_yaml() -> str:
    """Return the text of the file in crds/: the CustomResourceDefinition as YAML, below a comment that names its
    source."""
    header = "# Generated from core/finetune_core/api by `make crds`; do not edit.\n"
    return header + yaml.safe_dump(custom_resource_definition(), sort_keys=False, width=100)


def chart_template() -> str:
    """Return the CustomResourceDefinition as a template for the Helm chart. Helm renders the manifest only where the
    chart's value `crds.enabled` is true.

    The CRD is a template because Helm never upgrades CRDs that are in the `crds/` folder of a chart. Where the chart's
    value `crds.keep` is true, an annotation makes Helm keep the CRD when the chart is uninstalled. Helm would read `{{`
    in the descriptions of fields as the beginning of an expression. So each `{{` is replaced by an expression that Helm
    renders as `{{`.
    """
    header, _, manifest = crd_yaml().replace("{{", '{{ "{{" }}').partition("\n")
    keep = "metadata:\n{{- if .Values.crds.keep }}\n  annotations:\n    helm.sh/resource-policy: keep\n{{- end }}\n"
    body = manifest.replace("metadata:\n", keep, 1)
    return f"{header}\n{{{{- if .Values.crds.enabled }}}}\n{body}{{{{- end }}}}\n"


def main() -> None:
    """Write the CustomResourceDefinition into the folder that the command line names, as plain YAML or as a template of
    the Helm chart."""
    parser = argparse.ArgumentParser(
        description="Write the CustomResourceDefinition of FineTuneJob.",
        epilog="example: python -m finetune_core.api.crd crds",
    )
    parser.add_argument("folder", type=Path, help="folder for the manifest")
    parser.add_argument("--chart", action="store_true", help="write it as a template of the Helm chart")
    arguments = parser.parse_args()
    folder: Path = arguments.folder
    (folder / CRD_FILE).write_text(chart_template() if arguments.chart else crd_yaml(), encoding="utf-8")


if __name__ == "__main__":
    main()
