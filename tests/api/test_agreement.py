"""The Python validation (pydantic models and CEL rules) accepts a job exactly when the real API server accepts it. Both
then return the same spec, with all defaults filled in.

The jobs are generated from the schema. A long test tries every mutation of every place that the schema has; a short one
mutates random places.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from finetune_core.api.job import API_VERSION, KIND
from finetune_core.validation.validate_job import ValidationResult, validate_spec
from tests.api.mutations import change, mutations, mutations_in_place, to_text, with_deep_list
from tests.api.server import Answer, Server
from tests.api.strategies import SPEC, Schema, SchemaPath, jobs, leaves

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(3600)]

PLACES: dict[SchemaPath, Schema] = dict(leaves())


def seeded(examples: int) -> settings:
    """Return Hypothesis settings for ``examples`` generated jobs. The jobs are the same in every run of the test."""
    return settings(
        max_examples=examples,
        derandomize=True,
        database=None,
        # Only the phase `generate` is used. Hypothesis would otherwise shrink and explain a job that fails. Shrinking
        # takes thousands of requests, and explaining traces every line.
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )


def document(spec: Any) -> dict[str, Any]:
    """Return a FineTuneJob with ``spec``."""
    return {"apiVersion": API_VERSION, "kind": KIND, "metadata": {"name": "generated"}, "spec": spec}


def assert_agreement(server: Server, spec: Any) -> tuple[Answer, ValidationResult]:
    """Send a job with ``spec`` to the API server, validate it in Python, and fail the test if the two answers differ.
    Return both answers."""
    text = to_text(document(spec))
    answer, verdict = server.create(text), validate_spec(with_deep_list(spec))
    accepted = verdict.stored is not None
    problems = "; ".join(str(problem) for problem in verdict.problems)
    assert answer.accepted == accepted, f"server: {answer.message[:2000]}\nmodels: {problems}\n{text[:6000]}"
    if accepted:
        assert answer.spec == verdict.stored
    else:
        assert all(problem.path[0] == "spec" for problem in verdict.problems)
    return answer, verdict


def try_valid_jobs(server: Server, examples: int) -> Counter[str]:
    """Generate valid jobs. Check that the API server and the models accept each job, and that both return the same
    spec. Return how many of the jobs the operator can run, and how many it would refuse."""
    seen: Counter[str] = Counter()

    @seeded(examples)
    @given(spec=jobs())
    def property_of(spec: dict[str, Any]) -> None:
        answer, verdict = assert_agreement(server, spec)
        assert answer.accepted, f"a job that the strategy calls valid was refused: {answer.message}"
        seen["runnable" if not verdict.problems else "refused by the operator"] += 1

    property_of()
    return seen


def all_mutations(schema: Schema) -> list[tuple[str, Any]]:
    """Return the name and the new value of every mutation of a place with ``schema``. Mutations that add to the value
    have None as the new value."""
    return [*mutations(schema), *((name, None) for name in mutations_in_place(schema))]


def try_mutations(server: Server, examples: int) -> Counter[str]:
    """Mutate one random place in each of many jobs, and check that API server and models give the same answer. Return
    how many of the jobs were accepted and how many refused."""
    seen: Counter[str] = Counter()
    cases = st.sampled_from(list(PLACES)).flatmap(
        lambda path: st.tuples(st.just(path), st.sampled_from(all_mutations(PLACES[path])), jobs(path))
    )

    @seeded(examples)
    @given(case=cases)
    def property_of(case: tuple[SchemaPath, tuple[str, Any], dict[str, Any]]) -> None:
        path, (how, replacement), spec = case
        mutant = change(spec, path, how, PLACES[path], replacement)
        assert mutant is not None, path
        answer, _ = assert_agreement(server, mutant)
        seen["accepted" if answer.accepted else "refused"] += 1

    property_of()
    return seen


def test_generated_jobs_are_accepted_and_stored_alike(server: Server) -> None:
    print(dict(try_valid_jobs(server, 150)))


def test_mutated_jobs_are_judged_alike(server: Server) -> None:
    print(dict(try_mutations(server, 150)))


@pytest.mark.long
def test_two_thousand_generated_jobs(server: Server) -> None:
    seen = try_valid_jobs(server, 2000)
    print(dict(seen))
    assert seen.total() >= 2000


@pytest.mark.long
@pytest.mark.parametrize("path", PLACES, ids=".".join)
def test_every_mutation_of_every_place(server: Server, path: SchemaPath) -> None:
    """Each case tries all mutations of one place. All cases together try several thousand jobs."""
    seen: Counter[str] = Counter()

    @seeded(1)
    @given(spec=jobs(path))
    def property_of(spec: dict[str, Any]) -> None:
        for how, replacement in all_mutations(PLACES[path]):
            mutant = change(spec, path, how, PLACES[path], replacement)
            assert mutant is not None, path
            answer, _ = assert_agreement(server, mutant)
            seen["accepted" if answer.accepted else "refused"] += 1

    property_of()
    print(dict(seen))


def test_the_spec_itself_must_be_an_object(server: Server) -> None:
    for _, replacement in mutations(SPEC):
        assert_agreement(server, replacement if repr(replacement) != "MISSING" else {})
