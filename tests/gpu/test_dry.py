"""The check of the trainer on a GPU runs in every part on a CPU, with a tiny model: each section, each kind of end, and
the command.

The functions at the beginning are sections that end in all ways in which a section can end.
"""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from tests.gpu.__main__ import FILE, LONGEST_SECONDS, main, parse
from tests.gpu.catalogue import GOALS, SECTIONS, Section
from tests.gpu.expected_memory import expected_peak_bytes
from tests.gpu.report import Check, End, Expectation, Figures, Line, SectionEnd, from_json, to_json
from tests.gpu.runner import DRY_SLACK, IMPORT_SECONDS, run_sections
from tests.gpu.settings import FULL_SHORT, LLAMA_2_7B, SHORT, rank_environment
from tests.gpu.verdict import HIGHEST_STATUS, Verdict, judge

REPOSITORY = Path(__file__).resolve().parents[2]
DRY_RUN_SECONDS = 400
"""Far more than the dry run takes: 40 s on two cores with a load average of 8."""
GIB = 2**30
PARAMETERS = 6_738_415_616


# ---- Sections that end in all ways ----


def succeed(check: Check) -> None:
    check.say("process", pid=os.getpid())
    check.expect("one is one", True)


def expect_in_vain(check: Check) -> None:
    check.expect("one is two", False, found=1)
    check.expect("one is one", True)


def fail(check: Check) -> None:
    raise RuntimeError("on purpose")


def hang(check: Check) -> None:
    check.say("process", pid=os.getpid())
    threading.Event().wait()


def write_for_ever(check: Check) -> None:
    while True:
        check.say("more")


def die(check: Check) -> None:
    os._exit(3)


def compute_a_wrong_gradient(check: Check) -> None:
    """The section `stages` with gradients that are a thousandth too large, whichever engine is made."""
    from finetune_trainer.engine.making import make_engine
    from tests.gpu.exactness import stages

    def make_wrong(*arguments: Any) -> Any:
        engine = make_engine(*arguments)
        right = engine.backward
        engine.backward = lambda loss, *, last: right(loss * 1.001, last=last)  # type: ignore[method-assign]
        return engine

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tests.gpu.models.make_engine", make_wrong)
        stages(check)


def forget_the_moments(check: Check) -> None:
    """The section `resume` with a resumed run that keeps the weights and forgets AdamW's moments."""
    from tests.gpu.exactness import resume

    def load_nothing(engine: Any, folder: Path, *, updates: int) -> None:
        pass

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tests.gpu.exactness.load_state", load_nothing)
        resume(check)


def section(function: str, *, seconds: float = 60, module: str = __name__) -> Section:
    return Section(name=function, module=module, function=function, seconds=seconds, measures="", expects="")


def verdict_of(*sections: Section, seconds: float = 600, dry: bool = True) -> tuple[Verdict, list[Line]]:
    lines = run_sections(sections, dry=dry, seconds=seconds, write=lambda _: None)
    return judge(lines, GOALS, dry=dry), lines


def ends_of(lines: Sequence[Line]) -> list[End]:
    return [line.how for line in lines if isinstance(line, SectionEnd)]


def process_of(lines: Sequence[Line], name: str) -> int:
    return next(int(line.values["pid"]) for line in lines if isinstance(line, Figures) and line.section == name)


# ---- The dry run of the command ----


@dataclass(frozen=True)
class DryRun:
    """What `python -m tests.gpu --dry` printed."""

    status: int
    lines: Sequence[Line]
    verdict: Mapping[str, Any]
    table: str
    file: str
    output: str


@pytest.fixture(scope="module")
def dry(tmp_path_factory: pytest.TempPathFactory) -> DryRun:
    """The dry run of the whole check. It runs from a copy of the folder alone, as a pod mounts the folder."""
    folder = tmp_path_factory.mktemp("checks")
    shutil.copytree(REPOSITORY / "tests" / "gpu", folder / "tests" / "gpu")
    shutil.copy(folder / "tests" / "gpu" / "__init__.py", folder / "tests")
    done = subprocess.run(
        [sys.executable, "-m", "tests.gpu", "--dry", "--seconds", str(DRY_RUN_SECONDS)],
        cwd=folder,
        env=os.environ | {"OUT": str(folder / "out"), "PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
        check=False,
    )
    text, _, table = done.stdout.partition("\n\n")
    *texts, last = text.splitlines()
    return DryRun(
        done.returncode,
        [from_json(line) for line in texts],
        json.loads(last),
        table,
        (folder / "out" / FILE).read_text(),
        f"{done.stdout}\n{done.stderr}",
    )


@pytest.mark.gang
def test_a_dry_run_runs_every_section_and_nothing_fails(dry: DryRun) -> None:
    assert dry.status == 0, dry.output
    ends = [(line.section, line.how) for line in dry.lines if isinstance(line, SectionEnd)]
    assert ends == [(section.name, End.DONE) for section in SECTIONS]
    for section in SECTIONS:
        assert any(isinstance(line, Expectation) and line.section == section.name for line in dry.lines), section.name
    assert [line for line in dry.lines if isinstance(line, Expectation) and not line.holds] == []


@pytest.mark.gang
def test_the_verdict_of_a_dry_run_counts_its_lines_and_judges_no_goal(dry: DryRun) -> None:
    expectations = [line for line in dry.lines if isinstance(line, Expectation)]
    assert dry.verdict["kind"] == "verdict"
    assert dry.verdict["expectations"] == dry.verdict["held"] == len(expectations)
    assert dry.verdict["failures"] == []
    assert dry.verdict["exit_status"] == 0
    assert dry.verdict["goals"] == {goal.name: "not judged" for goal in GOALS}
    assert [row.split()[0] for row in dry.table.splitlines()[1 : len(SECTIONS) + 1]] == [each.name for each in SECTIONS]
    assert dry.table.rstrip().endswith("failures: 0")


@pytest.mark.gang
def test_the_file_in_out_has_the_json_lines(dry: DryRun) -> None:
    lines = dry.file.splitlines()
    assert [from_json(line) for line in lines[:-1]] == dry.lines
    assert json.loads(lines[-1]) == dry.verdict


@pytest.mark.gang
def test_a_dry_run_computes_every_figure_that_a_goal_needs(dry: DryRun) -> None:
    figures = {(line.section, line.case): line.values for line in dry.lines if isinstance(line, Figures)}
    for goal in GOALS:
        assert goal.figure in figures[goal.section, goal.case], goal.name
        assert goal.relative_to is None or goal.figure in figures[goal.relative_to], goal.name
    assert figures["lora-512", "8 x 512"]["tokens_per_second"] > 0
    assert figures["lora-4096", "1 x 4096 packed"]["examples"] > 1
    assert figures["lora-512", "kernels"]["milliseconds"]["matrix"] > 0


@pytest.mark.gang
def test_the_sections_notice_a_wrong_gradient_and_a_resume_that_forgets() -> None:
    wrong, forgetful = section("compute_a_wrong_gradient", seconds=200), section("forget_the_moments", seconds=100)
    verdict, lines = verdict_of(wrong, forgetful)
    assert ends_of(lines) == [End.DONE, End.DONE]
    held = [line for line in lines if isinstance(line, Expectation) and line.holds]
    assert held == []
    assert verdict.exit_status == len(verdict.expectations) == 14


# ---- How sections end ----


def test_a_section_that_fails_is_one_failure_and_the_next_one_gets_a_new_process() -> None:
    verdict, lines = verdict_of(section("succeed"), section("fail"), section("succeed"))
    assert ends_of(lines) == [End.DONE, End.RAISED, End.DONE]
    assert verdict.exit_status == 1
    assert verdict.failures == ["fail: raised: RuntimeError: on purpose"]
    raised = next(line for line in lines if isinstance(line, SectionEnd) and line.how is End.RAISED)
    assert "in fail" in raised.trace
    processes = [line.values["pid"] for line in lines if isinstance(line, Figures)]
    assert processes[0] != processes[1]


def test_sections_that_end_by_themselves_share_a_process() -> None:
    verdict, lines = verdict_of(section("succeed"), section("expect_in_vain"), section("succeed"))
    assert len({line.values["pid"] for line in lines if isinstance(line, Figures)}) == 1
    assert verdict.exit_status == 1
    assert verdict.failures == ["expect_in_vain: does not hold: one is two"]


def test_a_section_past_its_bound_is_cut_and_its_process_is_gone() -> None:
    verdict, lines = verdict_of(section("hang", seconds=1 / DRY_SLACK), section("succeed"))
    assert ends_of(lines) == [End.CUT, End.DONE]
    assert verdict.failures == ["hang: cut: took longer than 1 s"]
    assert not Path(f"/proc/{process_of(lines, 'hang')}").exists()


def test_a_section_that_writes_past_its_bound_is_cut_too() -> None:
    verdict, lines = verdict_of(section("write_for_ever", seconds=1 / DRY_SLACK))
    assert ends_of(lines) == [End.CUT]
    assert verdict.exit_status == 1


def test_a_section_whose_process_ends_is_one_failure() -> None:
    verdict, lines = verdict_of(section("die"), section("succeed"))
    assert ends_of(lines) == [End.DIED, End.DONE]
    assert verdict.failures == ["die: died: its process ended with status 3"]


def test_a_module_that_can_not_be_imported_is_one_failure() -> None:
    verdict, lines = verdict_of(section("any", module="tests.gpu.none"), section("succeed"))
    assert ends_of(lines) == [End.RAISED, End.DONE]
    assert verdict.failures == ["any: raised: ModuleNotFoundError: No module named 'tests.gpu.none'"]


def test_a_section_for_which_no_time_is_left_is_skipped_and_counts_as_failed() -> None:
    verdict, lines = verdict_of(section("succeed", seconds=60), seconds=20, dry=False)
    assert ends_of(lines) == [End.SKIPPED]
    assert verdict.exit_status == 1
    assert verdict.failures[0].startswith("succeed: skipped: ")


# ---- The command line ----


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--only", "lora"], "'lora' is no section; the sections are machine, join, "),
        (["--seconds", "0"], "must be a number of seconds above 0, and '0' is none"),
        (["--seconds", "soon"], "must be a number of seconds above 0, and 'soon' is none"),
    ],
)
def test_a_wrong_option_gets_a_sentence(
    arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as error:
        main(arguments)
    assert error.value.code == 2
    assert sentence in capsys.readouterr().err


def test_the_help_names_every_section_and_has_examples(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(["--help"])
    shown = capsys.readouterr().out
    assert [each.name for each in SECTIONS if f"  {each.name} " not in shown] == []
    assert "python -m tests.gpu --only machine,join,lora-512 " in shown


def test_only_selects_sections_in_the_order_of_the_check() -> None:
    assert [each.name for each in parse(["--only", "full,machine"]).only] == ["machine", "full"]


# ---- The catalogue ----


def test_the_sections_fit_into_eight_minutes() -> None:
    assert LONGEST_SECONDS == 480
    assert IMPORT_SECONDS / 2 + sum(each.seconds for each in SECTIONS) <= LONGEST_SECONDS


def test_every_section_has_its_function_and_every_goal_its_section() -> None:
    names = [each.name for each in SECTIONS]
    assert len(set(names)) == len(names)
    for each in SECTIONS:
        # Importing the module would take seconds, because it imports torch.
        tree = ast.parse((REPOSITORY / f"{each.module.replace('.', '/')}.py").read_text(encoding="utf-8"))
        assert each.function in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    for goal in GOALS:
        assert goal.section in names
        assert (goal.at_least is None) != (goal.at_most is None)


# ---- The verdict ----


def measured(
    *,
    tokens: float = 20_000,
    tflops: float = 530,
    packed: float = 19_000,
    full: float = 12_000,
    gpu: str = "NVIDIA H200",
) -> list[Line]:
    return [
        Figures("lora-512", "8 x 512", {"tokens_per_second": tokens, "tflops": tflops, "gpu": gpu}),
        Figures("lora-4096", "1 x 4096 packed", {"tokens_per_second": packed, "gpu": gpu}),
        Figures("full", "8 x 512", {"tokens_per_second": full, "gpu": gpu}),
        Figures("lora-512", "waits", {"waits_per_micro_batch": 0.0, "waits_per_step": 1.0, "gpu": gpu}),
    ]


def test_figures_that_reach_all_goals_give_no_failure() -> None:
    verdict = judge(measured(), GOALS, dry=False)
    assert {judged.grade.value for judged in verdict.goals} == {"reached"}
    assert verdict.exit_status == 0


@pytest.mark.parametrize(
    ("lines", "missed"),
    [
        (measured(tflops=499), ["LoRA 7B, 8 x 512: TFLOP/s"]),
        (measured(packed=17_900), ["LoRA 7B: packed 1 x 4096 as a share of 8 x 512, tokens per second"]),
        (measured(full=10_500), ["Full 7B, 8 x 512: tokens per second"]),
        (measured(full=14_500), ["LoRA as a multiple of Full, 8 x 512, tokens per second"]),
    ],
)
def test_a_figure_below_its_goal_is_one_failure(lines: list[Line], missed: list[str]) -> None:
    verdict = judge(lines, GOALS, dry=False)
    assert [judged.goal.name for judged in verdict.goals if judged.grade.value == "missed"] == missed
    assert verdict.exit_status == 1


def test_one_wait_in_a_micro_batch_misses_its_goal() -> None:
    lines = [Figures("lora-512", "waits", {"waits_per_micro_batch": 1.0, "waits_per_step": 1.0, "gpu": "NVIDIA H200"})]
    assert judge(lines, GOALS, dry=False).exit_status == 1


def test_goals_for_one_gpu_are_not_judged_on_another() -> None:
    verdict = judge(
        measured(tokens=9000, tflops=240, packed=8500, full=6000, gpu="NVIDIA A100-SXM4-80GB"), GOALS, dry=False
    )
    grades = {judged.goal.name: judged.grade.value for judged in verdict.goals}
    assert grades["LoRA 7B, 8 x 512: TFLOP/s"] == "not judged"
    assert grades["LoRA as a multiple of Full, 8 x 512, tokens per second"] == "reached"
    assert "the goal is for H200, and this is NVIDIA A100-SXM4-80GB" in verdict.as_table()


def test_a_figure_that_was_not_measured_is_not_judged() -> None:
    verdict = judge(measured()[1:], GOALS, dry=False)
    open_goals = [judged for judged in verdict.goals if judged.grade.value == "not judged"]
    assert {judged.reason for judged in open_goals} == {"not measured", "lora-512 8 x 512 was not measured"}
    assert verdict.exit_status == 0


def test_the_exit_status_has_an_upper_bound() -> None:
    lines = [Expectation("any", "one is two", False)] * 200
    assert judge(lines, (), dry=True).exit_status == HIGHEST_STATUS


def test_lines_survive_their_json_also_with_numbers_that_json_lacks() -> None:
    line = Figures("any", "case", {"loss": float("nan"), "places": {"a.py:1": 2}, "kernel": None})
    assert from_json(to_json(line, 1.0)) == Figures(
        "any", "case", {"loss": "nan", "places": {"a.py:1": 2}, "kernel": None}
    )


# ---- The environment of a rank ----


def test_a_rank_of_the_check_has_the_variables_that_the_launcher_sets_for_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise torch's allocator would leave other gaps than in a training, and NCCL would not say why it fails."""
    monkeypatch.delenv("PYTORCH_ALLOC_CONF", raising=False)
    monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF", raising=False)
    assert rank_environment(dry=False)["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"
    assert rank_environment(dry=False, world_size=2)["NCCL_DEBUG"] == "WARN"
    assert "PYTORCH_ALLOC_CONF" not in rank_environment(dry=True)


# ---- Expected memory ----


def test_the_expected_peaks_of_llama_2_7b() -> None:
    """With the plain engine, Full takes 16 bytes a parameter and what a layer needs."""
    assert expected_peak_bytes(SHORT, LLAMA_2_7B) / GIB == pytest.approx(26.6, abs=0.2)
    assert expected_peak_bytes(FULL_SHORT, LLAMA_2_7B) / GIB == pytest.approx(115.3, abs=0.2)
    plain = expected_peak_bytes(replace(FULL_SHORT, stage=None), LLAMA_2_7B)
    assert plain / PARAMETERS == pytest.approx(16, abs=0.5)
