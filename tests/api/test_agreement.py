"""The pydantic models, with the CEL rules, accept a job if and only if the real API server does, and both then hold
the same object. Jobs are generated from the schema; mutations try every place of it."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from finetune_core.api.job import API_VERSION, KIND
from finetune_core.validation.validate_job import ValidationResult, validate_spec
from tests.api.mutations import change, mutations, mutations_in_place, to_text, with_abyss
from tests.api.server import Answer, Server
from tests.api.strategies import SPEC, Schema, SchemaPath, jobs, leaves

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(3600)]

PLACES: dict[SchemaPath, Schema] = dict(leaves())


def seeded(examples: int) -> settings:
    """Return settings under which every run tries the same jobs."""
    return settings(
        max_examples=examples,
        derandomize=True,
        deadline=None,
        database=None,
        # A failing job is shown as it is: to shrink it takes thousands of requests, to explain it traces every line.
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )


def document(spec: Any) -> dict[str, Any]:
    """Return a job with ``spec``."""
    return {"apiVersion": API_VERSION, "kind": KIND, "metadata": {"name": "generated"}, "spec": spec}


def agree(server: Server, spec: Any) -> tuple[Answer, ValidationResult]:
    """Ask both sides about ``spec`` and hold them to one opinion."""
    text = to_text(document(spec))
    answer, verdict = server.create(text), validate_spec(with_abyss(spec))
    accepted = verdict.stored is not None
    problems = "; ".join(str(problem) for problem in verdict.problems)
    assert answer.accepted == accepted, f"server: {answer.message[:2000]}\nmodels: {problems}\n{text[:6000]}"
    if accepted:
        assert answer.spec == verdict.stored
    else:
        assert all(problem.path[0] == "spec" for problem in verdict.problems)
    return answer, verdict


def try_valid_jobs(server: Server, examples: int) -> Counter[str]:
    """Generate jobs and return how many there were, by whether the operator could run them."""
    seen: Counter[str] = Counter()

    @seeded(examples)
    @given(spec=jobs())
    def property_of(spec: dict[str, Any]) -> None:
        answer, verdict = agree(server, spec)
        assert answer.accepted, f"a job that the strategy calls valid was refused: {answer.message}"
        seen["runnable" if not verdict.problems else "refused by the operator"] += 1

    property_of()
    return seen


def ways(schema: Schema) -> list[tuple[str, Any]]:
    """Return every mutation of a place with ``schema``."""
    return [*mutations(schema), *((name, None) for name in mutations_in_place(schema))]


def try_mutations(server: Server, examples: int) -> Counter[str]:
    """Mutate jobs at places that chance chooses and return how many there were, by answer."""
    seen: Counter[str] = Counter()
    cases = st.sampled_from(list(PLACES)).flatmap(
        lambda path: st.tuples(st.just(path), st.sampled_from(ways(PLACES[path])), jobs(path))
    )

    @seeded(examples)
    @given(case=cases)
    def property_of(case: tuple[SchemaPath, tuple[str, Any], dict[str, Any]]) -> None:
        path, (how, replacement), spec = case
        mutant = change(spec, path, how, PLACES[path], replacement)
        assert mutant is not None, path
        answer, _ = agree(server, mutant)
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
    """All places times all mutations: about 9,000 jobs."""
    seen: Counter[str] = Counter()

    @seeded(1)
    @given(spec=jobs(path))
    def property_of(spec: dict[str, Any]) -> None:
        for how, replacement in ways(PLACES[path]):
            mutant = change(spec, path, how, PLACES[path], replacement)
            assert mutant is not None, path
            answer, _ = agree(server, mutant)
            seen["accepted" if answer.accepted else "refused"] += 1

    property_of()
    print(dict(seen))


def test_the_spec_itself_must_be_an_object(server: Server) -> None:
    for _, replacement in mutations(SPEC):
        agree(server, replacement if repr(replacement) != "MISSING" else {})
