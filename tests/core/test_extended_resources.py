"""`resources.extended` takes the names of extended resources and huge pages that a container may ask for in Kubernetes,
with their kind of amount, and refuses all others with the name of the entry. `podTemplate.securityContext` takes one
capability."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune_core.api.resources import EXTENDED_LIMIT, EXTENDED_RULES
from finetune_core.api.spec import FineTuneJobSpec
from finetune_core.validation.cel_rules import holds
from finetune_core.validation.problems import Refusal
from finetune_core.validation.runnable import unrunnable
from finetune_core.validation.validate_job import validate_job
from tests.core.jobs import quickstart

GPU, NAMES, AMOUNTS = (message for _, message in EXTENDED_RULES)
ENTRIES = [
    ("rdma/hca_shared_devices_a", 1, None),
    ("rdma/ib", "8", None),
    ("vpc.amazonaws.com/efa", 32, None),
    ("nvidia.com/hostdev", 1, None),
    ("hugepages-2Mi", "5120Mi", None),
    ("hugepages-2Mi", "1Gi", None),
    ("hugepages-1Gi", "4Gi", None),
    ("deviceclass.resource.kubernetes.io/rdma", 1, None),
    ("a" * 244 + "/b", 1, NAMES),
    ("a" * 126 + "/b", 1, None),
    ("a" * 127 + "/b", 1, NAMES),
    ("example.com/" + "x" * 63, 1, None),
    ("example.com/" + "x" * 64, 1, NAMES),
    ("nvidia.com/gpu", 1, GPU),
    ("cpu", 1, NAMES),
    ("memory", "4Gi", NAMES),
    ("ephemeral-storage", "4Gi", NAMES),
    ("", 1, NAMES),
    ("rdma", 1, NAMES),
    ("rdma/", 1, NAMES),
    ("/ib", 1, NAMES),
    ("a/b/c", 1, NAMES),
    ("a..b/c", 1, NAMES),
    ("-a/b", 1, NAMES),
    ("Rdma/ib", 1, NAMES),
    ("rdma/ib\n", 1, NAMES),
    ("rdma/-ib", 1, NAMES),
    ("requests.example.com/x", 1, NAMES),
    ("kubernetes.io/x", 1, NAMES),
    ("node.kubernetes.io/x", 1, NAMES),
    ("mykubernetes.io/x", 1, NAMES),
    ("hugepages-", "4Mi", NAMES),
    ("hugepages-0Mi", "4Mi", NAMES),
    ("hugepages-2M", "4Mi", NAMES),
    ("hugepages-a/b", "4Mi", NAMES),
    ("hugepages-2Mi", 4, AMOUNTS),
    ("hugepages-2Mi", "4", AMOUNTS),
    ("rdma/ib", "1Gi", AMOUNTS),
]


def validated(extended: Any) -> list[str]:
    """Return the problems that `finetune validate` names for a job with ``extended``."""
    return [str(problem) for problem in validate_job(quickstart("resources.extended", extended)).problems]


@pytest.mark.parametrize(
    ("name", "amount", "message"), ENTRIES, ids=[f"{name[:40]!r} {amount}" for name, amount, _ in ENTRIES]
)
def test_an_entry_is_taken_or_refused_by_its_name(name: str, amount: int | str, message: str | None) -> None:
    found = validated({"example.com/fine": 1, name: amount})
    assert found == ([] if message is None else [f"spec.resources.extended.{name}: {message}"])


@pytest.mark.parametrize(
    "amount", [0, -1, 10_000, "0", "01", "1.5", "1k", "4M", "", " 1", "1\n", True, 1.5, [1], {"a": 1}]
)
def test_an_amount_is_a_count_or_a_size(amount: Any) -> None:
    (found,) = validated({"rdma/ib": amount})
    assert found == (
        "spec.resources.extended.rdma/ib: must be a whole number between 1 and 9999, or an amount of memory in huge"
        " pages such as 5120Mi"
    )


def test_absent_null_and_too_many() -> None:
    assert validated({}) == validated({"rdma/ib": None}) == []
    assert validated({f"example.com/x{number}": 1 for number in range(EXTENDED_LIMIT)}) == []
    (found,) = validated({f"example.com/x{number}": 1 for number in range(EXTENDED_LIMIT + 1)})
    assert found == f"spec.resources.extended: must be an object with at most {EXTENDED_LIMIT} entries"


@pytest.mark.parametrize(
    ("amount", "refused"), [("4Mi", False), ("3Mi", True), ("1Gi", False), ("2048Ki", False), ("1Ki", True)]
)
def test_huge_pages_come_whole(amount: str, refused: bool) -> None:
    document = quickstart("resources.extended", {"hugepages-2Mi": amount})
    problems = validate_job(document).problems
    assert [(str(problem), problem.refused_by) for problem in problems] == (
        [("spec.resources.extended.hugepages-2Mi: must be a multiple of 2Mi, such as 8Mi", Refusal.OPERATOR)]
        if refused
        else []
    )


@pytest.mark.parametrize(
    ("context", "refused"),
    [
        ({}, None),
        ({"capabilities": {}}, None),
        ({"capabilities": {"add": []}}, None),
        ({"capabilities": {"add": ["IPC_LOCK"]}}, None),
        ({"capabilities": {"add": ["SYS_ADMIN"]}}, "capabilities.add[0]: must be one of IPC_LOCK"),
        ({"capabilities": {"add": ["ipc_lock"]}}, "capabilities.add[0]: must be one of IPC_LOCK"),
        ({"capabilities": {"add": ["IPC_LOCK"] * 2}}, "capabilities.add: must be a list of at most 1 items"),
        ({"capabilities": {"add": "IPC_LOCK"}}, "capabilities.add: must be a list of at most 1 items"),
        ({"capabilities": {"drop": []}}, "capabilities.drop: unknown field; must be one of add"),
        ({"privileged": True}, "privileged: unknown field; must be one of capabilities"),
        ({"runAsUser": 0}, "runAsUser: unknown field; must be one of capabilities"),
    ],
)
def test_one_capability_can_be_added_and_nothing_else_changed(context: Any, refused: str | None) -> None:
    problems = validate_job(quickstart("podTemplate.securityContext", context)).problems
    found = [str(problem).removeprefix("spec.podTemplate.securityContext.") for problem in problems]
    assert found == ([] if refused is None else [refused])


WORDS = "rdma kubernetes.io deviceclass.resource.kubernetes.io requests. nvidia.com gpu hugepages- 2Mi / . - a Z 0 _ é"
PARTS = st.sampled_from([*WORDS.split(), "\n", " "])
HOSTILE = st.one_of(st.text(max_size=150), st.lists(PARTS, max_size=6).map("".join))
LABEL = re.compile("[a-z0-9]([-a-z0-9]*[a-z0-9])?")
NAME = re.compile("[A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?")


def kubernetes_takes(name: str) -> bool:
    """Return whether a container may ask for the resource ``name``, by the rules of Kubernetes' functions
    `validateContainerResourceName` and `IsExtendedResourceName`, apart from `cpu`, `memory` and `ephemeral-storage`."""
    domain, slash, rest = name.partition("/")
    if not slash:
        return re.fullmatch("hugepages-[1-9][0-9]{0,3}[KMG]i", name) is not None
    is_qualified = all(LABEL.fullmatch(part) for part in domain.split(".")) and len(f"requests.{domain}") <= 253
    if not is_qualified or len(rest) > 63 or not NAME.fullmatch(rest) or name.startswith(("requests.", "hugepages-")):
        return False
    return not domain.endswith("kubernetes.io") or domain == "deviceclass.resource.kubernetes.io"


@given(HOSTILE)
def test_any_name_is_judged_as_kubernetes_judges_it(name: str) -> None:
    taken = all(holds(rule, {name: "4Mi" if name.startswith("hugepages-") else 1}) for rule, _ in EXTENDED_RULES)
    assert taken == (kubernetes_takes(name) and len(name) <= 128 and name != "nvidia.com/gpu")


@given(
    st.dictionaries(
        HOSTILE, st.one_of(st.integers(1, 9999), st.sampled_from(["1", "4Mi", "3Ki", "9999Gi"])), max_size=8
    )
)
def test_hostile_entries_are_refused_in_words_and_never_crash(extended: dict[str, int | str]) -> None:
    problems = validate_job(quickstart("resources.extended", extended)).problems
    assert all("must" in problem.message for problem in problems)
    taken = all(holds(rule, extended) for rule, _ in EXTENDED_RULES)
    assert taken == all(problem.refused_by is Refusal.OPERATOR for problem in problems)
    unrunnable(FineTuneJobSpec.model_validate(quickstart("resources.extended", extended)["spec"]))
