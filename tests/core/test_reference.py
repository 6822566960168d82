"""docs/api.md in the repository equals the text that is generated from the pydantic models of the API. The page
explains every condition and every reason."""

from pathlib import Path

import pytest

from finetune_core.api.condition_reasons import CONDITIONS, REASONS, STATES
from finetune_core.api.conditions import ConditionType, Reason
from finetune_core.api.reference import REFERENCE_FILE, reference
from finetune_core.api.schema import openapi_schema
from finetune_core.api.spec import FineTuneJobSpec

ROOT = Path(__file__).resolve().parents[2]


def test_the_committed_reference_is_the_generated_one() -> None:
    assert (ROOT / "docs" / REFERENCE_FILE).read_text(encoding="utf-8") == reference(), "run: make docs"


def test_every_condition_and_reason_is_explained_and_used() -> None:
    assert set(CONDITIONS) == set(STATES) == set(ConditionType)
    assert set(REASONS) == set(Reason)
    used = {reason for statuses in STATES.values() for reasons in statuses.values() for reason in reasons}
    assert used == set(Reason)


@pytest.mark.parametrize("kind", ConditionType)
def test_every_condition_can_be_true_and_can_be_otherwise(kind: ConditionType) -> None:
    assert "True" in STATES[kind]
    assert len(STATES[kind]) >= 2


def test_every_rule_says_what_must_be() -> None:
    schemas = [openapi_schema(FineTuneJobSpec)]
    while schemas:
        schema = schemas.pop()
        for rule in schema.get("x-kubernetes-validations", ()):
            assert " must " in rule["message"], rule
            assert "`" in rule["message"], rule
        schemas += schema.get("properties", {}).values()
        schemas += [schema["items"]] if "items" in schema else []
