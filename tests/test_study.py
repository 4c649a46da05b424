"""Claims about studies: what a file may say, which arms it has, how they are run, what is made of them."""

from __future__ import annotations

import json
import math
import os
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from study_world import leave, leave_arm, made, study_file, write_recipe
from typer.testing import CliRunner

from dro_rl.cli import app
from dro_rl.cli import study as study_commands
from dro_rl.errors import InputError
from dro_rl.evaluation.results import read_results, write_results
from dro_rl.evaluation.stages import write_stages
from dro_rl.job.identity import this_machine
from dro_rl.recipe import load_recipe, parse_command_line, read_keys
from dro_rl.shipped import STUDIES, names
from dro_rl.study import run as running
from dro_rl.study.arms import arms_of, check_unchanged
from dro_rl.study.check import check_arms
from dro_rl.study.machines import note_machine
from dro_rl.study.metrics import GRADIENTS, LOGGED
from dro_rl.study.plan import read_study
from dro_rl.study.report import make_report, to_markdown, write_section
from dro_rl.study.results import Results, deepest_change
from dro_rl.study.run import how_far, places_of, run_arms, tail


def dro_rl(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


# The file ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", names(STUDIES))
def test_every_shipped_study_is_one(name: str) -> None:
    study = read_study(name)
    assert study.claims
    assert len(study.seeds) >= 2
    assert study.about


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"seedz": [1]}, "seedz: [1]: there is no such key. Did you mean seeds?"),
        ({"base": ""}, "base: missing: a study changes a recipe"),
        ({"base": "quickstrt"}, "Did you mean quickstart?"),
        ({"seeds": []}, "seeds: []: a study has seeds, each once"),
        ({"seeds": [1, 1]}, "seeds: [1, 1]: a study has seeds, each once"),
        ({"seeds": ["a"]}, "seeds: ['a']: this is a list of a whole number"),
        ({"level": 1.5}, "level: 1.5: this is in (0, 0.5]"),
        ({"variants": {}}, "variants: missing: a study has at least one variant"),
        ({"variants": [1]}, "variants: [1]: this is a dictionary"),
        ({"variants": {"joint": 3}}, "variants.joint: joint: 3: this is keys with their values"),
        ({"variants": {"a/b": {}}}, "its folder has it: letters, digits, - and _"),
        ({"metrics": ["em", "f2"]}, "metrics: 'f2': this is a metric"),
        (
            {"keys": {"num_generation": 4}},
            "keys: num_generation: 4: there is no such key. Did you mean num_generations",
        ),
        ({"keys": {"seed": 4}}, "keys: seed: 4: the study gives each arm its own"),
        ({"keys": {"num_generations": 0}}, "variants.joint: num_generations: 0: this is at least 1"),
        (
            {"variants": {"joint": {"start_from": "x"}}},
            "start_from: 'x': there is no such key. Did you mean starts_from?",
        ),
        ({"variants": {"joint": {"output_dir": "x"}}}, "output_dir: 'x': the study gives each arm its own"),
        ({"variants": {"joint": {"weighting": "even"}}}, "variants.joint: weighting: 'even': this is one of"),
        (
            {"variants": {"joint": {"num_train_epochs": 3}}},
            "variants.joint: num_train_epochs: 3: this key has no effect",
        ),
        ({"variants": {"joint": {"of": "joint"}}}, "a stage, or a control, is looked at of a trained variant"),
        ({"variants": {"joint": {"control": "random"}}}, "a stage, or a control, is looked at of a trained variant"),
        ({"variants": {"joint": {}, "r": {"of": "join", "control": "random"}}}, "Did you mean joint?"),
        ({"variants": {"joint": {}, "r": {"of": "joint", "control": "chance"}}}, "control: 'chance': this is one of"),
        ({"variants": {"joint": {}, "r": {"of": "joint", "control": "gold", "seed": 1}}}, "the study gives each arm"),
        ({"variants": {"joint": {}, "r": {"of": "joint", "control": "gold", "beta": 1}}}, "nothing is trained here"),
        ({"variants": {"joint": {}, "r": {"of": "joint", "stage": "base", "control": "gold"}}}, "kept at the end"),
        (
            {"variants": {"joint": {}, "r": {"measure": "gradients", "of": "joint", "stage": "base"}}},
            "a training starts",
        ),
        ({"variants": {"joint": {"starts_from": "joint"}}}, "this is another variant, which trains"),
        ({"variants": {"a": {"starts_from": "b"}, "b": {"starts_from": "a"}}}, "Break the circle"),
    ],
)
def test_a_wrong_study_is_one_line_that_says_where(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    if "variants" in changes:
        changes = {"claims": {}, **changes}
    path = study_file(tmp_path, **changes)
    with pytest.raises(InputError) as error:
        read_study(path)
    assert str(error.value).startswith(str(path))
    assert said in str(error.value)


def test_an_arm_that_ended_early_is_left_out_where_it_did_not_come(tmp_path: Path) -> None:
    """As early stopping ends one: the others are shown, and what is missing is said."""
    claim = {"variant": "joint", "against": 10, "metric": "em", "stage": "iteration-2"}
    study = made(tmp_path, claims={"late": claim}, metrics=["em", "recall@3"])
    leave(study, {"joint": [[1, 1, 1, 1]] * 3}, stage="iteration-2")
    leave(study, {"joint": [[0, 1, 0, 1]] * 3})
    for arm, last in zip((arm for arm in arms_of(study) if arm.variant.name == "joint"), (2, 2, 1), strict=True):
        stages = [{"stage": name, "em": 0.0} for name in ("base", f"iteration-{last}", "final")]
        write_stages(arm.folder, stages)
    report = make_report(study, Results(study))
    assert report.claims[0].contrast.seeds == 2
    assert report.ended_before == {"joint/seed-2": ["iteration-2"]}
    assert report.means["joint"]["em"].seeds == 3
    shown = dro_rl("study", "show", study.path)
    assert shown.exit_code == 0, shown.output
    assert "joint/seed-2 ended before iteration-2" in shown.output
    assert "joint/seed-2 ended before iteration-2" in (tmp_path / "study" / "report.md").read_text()


def test_what_no_seed_defines_is_not_called_not_run(tmp_path: Path) -> None:
    """Recall on a dev split without labels; and in one seed of three, a table says in how many."""
    claim = {"variant": "joint", "against": 10, "metric": "recall@3"}
    study = made(tmp_path, claims={"it": claim}, metrics=["em", "recall@3"])
    leave(study, {"joint": [[1, 1, 1, 1]] * 3})
    for seed in range(3):
        change_scores(tmp_path / f"study/joint/seed-{seed}/evaluation/final.parquet", "recall@3", math.nan)
    report = make_report(study, Results(study))
    assert report.claims[0].words == "undecided: undefined in every seed"
    leave_arm(arms_of(study)[0], [1, 1, 1, 1])
    assert "| joint | 3 | 100.00 [100.00 … 100.00] | 100.00 (1 seed) |" in to_markdown(
        make_report(study, Results(study))
    )


def change_scores(path: Path, metric: str, value: float) -> None:
    rows, conditions = read_results(path)
    write_results(path, [replace(row, scores={**row.scores, metric: value}) for row in rows], conditions)


@pytest.mark.parametrize(
    ("claim", "said"),
    [
        ({"tests": "above"}, "tests: 'above': there is no such key. Did you mean test?"),
        ({"test": "better"}, "test: 'better': this is one of above, below"),
        ({"variant": "join"}, "variant: 'join': this is one of the study's variants"),
        ({"variant": ""}, "variant: missing"),
        ({"against": "frozn"}, "Did you mean frozen?"),
        ({"against": "joint"}, "a claim compares two variants"),
        ({"against": None}, "this is a variant, or a number"),
        ({"test": "steadier", "against": 3}, "against: 3: this is a variant"),
        ({"test": "steadier", "by": 3}, "by: 3: steadier compares variances"),
        ({"by": -1}, "by: -1: this is at least 0"),
        ({"metric": "ems"}, "metric: 'ems': this is a metric of joint"),
        ({"metric": "rollouts/claen"}, "Did you mean rollouts/clean?"),
        ({"metric": "evidence_bound", "against": "random"}, "this is a metric of random"),
        ({"metric": "gradient_variance"}, "this is a metric of joint"),
        ({"metric": "ess", "type": "2-hop"}, "types are of the dev split's questions"),
        ({"test": "never_falls"}, "against: 'frozen': never_falls looks at all iterations"),
        ({"test": "never_falls", "against": None, "stage": "base"}, "stage: 'base': never_falls looks at all"),
        ({"test": "never_falls", "against": None, "variant": "random"}, "never_falls looks at a training"),
        ({"against": "random", "stage": "base"}, "stage: 'base': random is no training"),
        ({"stage": "iteraton-2"}, "stage: 'iteraton-2': a stage of this training is base, final, or iteration-1 to"),
        ({"stage": "iteration-0"}, "stage: 'iteration-0': a stage of this training"),
        ({"stage": "iteration-99999"}, "stage: 'iteration-99999': a stage of this training"),
        ({"stage": "warmup"}, "stage: 'warmup': a stage of this training"),
        ({"level": 0}, "level: 0: this is in (0, 0.5]"),
    ],
)
def test_a_wrong_claim_is_one_line_that_says_where(tmp_path: Path, claim: dict[str, Any], said: str) -> None:
    right = {"variant": "joint", "against": "frozen", "metric": "em"}
    with pytest.raises(InputError) as error:
        made(tmp_path, claims={"mine": {**right, **claim}})
    assert "claims.mine: " in str(error.value)
    assert said in str(error.value)


def test_a_variant_that_is_a_stage_which_a_training_cannot_have_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"variants\.start: stage: 'bsae': a stage of this.*Did you mean base"):
        made(tmp_path, variants={"joint": {}, "start": {"of": "joint", "stage": "bsae"}}, claims={})
    warmed = {"warmup": "both", "warmup_selector_order": "random"}
    made(tmp_path, variants={"joint": warmed, "start": {"of": "joint", "stage": "warmup"}}, claims={})


def test_a_base_recipe_is_looked_for_beside_the_study(tmp_path: Path) -> None:
    (tmp_path / "other.yaml").write_text("extends: quickstart\nnum_iterations: 3\n")
    study = made(tmp_path, base="other.yaml", claims={})
    assert Path(study.base) == tmp_path / "other.yaml"
    assert str(tmp_path / "other.yaml") in arms_of(study)[0].command


@pytest.mark.parametrize("variants", [{"joint": {}}, {"m1": {"measure": "gradients"}}])
def test_a_study_without_metrics_or_claims_is_shown(tmp_path: Path, variants: dict[str, Any]) -> None:
    study = made(tmp_path, variants=variants, claims={}, metrics=[])
    shown = dro_rl("study", "show", study.path)
    assert shown.exit_code == 0, shown.output
    assert "report.md, .json" in shown.output
    assert ".png" not in shown.output


def test_gradients_are_shown_unless_told_where_nothing_else_is_measured(tmp_path: Path) -> None:
    assert made(tmp_path, variants={"m1": {"measure": "gradients"}}, claims={}, metrics=None).metrics == GRADIENTS


def test_the_page_names_the_command_for_this_file(tmp_path: Path) -> None:
    study = made(tmp_path, claims={})
    assert f"`dro-rl study run {study.path}`" in to_markdown(make_report(study, Results(study)))
    shipped = read_study("joint")
    assert "`dro-rl study run joint`" in to_markdown(make_report(shipped, Results(shipped)))


def test_seeds_may_be_given_in_place_of_the_files(tmp_path: Path) -> None:
    study = made(tmp_path, claims={}, seeds=[0], variants={"joint": {}})
    printed = dro_rl("study", "run", study.path, "--seeds", "3,1", "--print")
    assert [line.split("--seed ")[1].split()[0] for line in printed.output.splitlines()] == ["3", "1"]
    shown = dro_rl("study", "show", study.path, "--seeds", "3,1")
    assert "joint/seed-3, joint/seed-1" in shown.output
    page = (study.output_dir / "report.md").read_text(encoding="utf-8")
    assert f"`dro-rl study run {study.path} --seeds 3,1`" in page
    for wrong, said in (("3,3", "each once"), ("", "whole numbers"), ("1,x", "whole numbers"), ("-1", "whole numbers")):
        refused = dro_rl("study", "run", study.path, "--seeds", wrong)
        assert refused.exit_code == 2
        assert said in refused.output


def test_keys_after_a_study_go_over_those_of_all_and_under_a_variants_own(tmp_path: Path) -> None:
    variants = {"joint": {}, "wide": {"num_generations": 16}, "random": {"of": "joint", "control": "random"}}
    study = made(
        tmp_path, claims={}, seeds=[0], keys={"num_iterations": 2, "questions_per_iteration": 8}, variants=variants
    )
    elsewhere = str(tmp_path / "other runs")
    over = ["--num_generations", "4", "--dataset_config", "12", "--num_iterations", "3", "--output_dir", elsewhere]
    joint, wide, random = dro_rl("study", "run", study.path, *over, "--print").output.splitlines()
    for command in (joint, wide):
        words = shlex.split(command)
        assert words[words.index("--dataset_config") + 1] == "'12'"
        assert "--num_iterations 3" in command
    assert "--num_generations 4" in joint
    assert "--num_generations 16" in wide
    assert shlex.split(random.partition("  #")[0])[2] == f"{elsewhere}/joint/seed-0"

    shown = dro_rl("study", "show", study.path, "--seeds", "0,1", *over)
    assert shown.exit_code == 0, shown.output
    page = (tmp_path / "other runs" / "report.md").read_text(encoding="utf-8")
    assert f"dro-rl study run {study.path} --seeds 0,1 --num_generations 4 " in page
    assert f"--output_dir '{elsewhere}'" in page
    for wrong, said in (
        (
            ["--num_generation", "4"],
            "command line: num_generation: 4: there is no such key. Did you mean num_generations?",
        ),
        (["--seed", "4"], "command line: seed: 4: the study gives each arm its own"),
        (["--output_dir"], "command line: output_dir: True: this is a folder"),
        (["--num_generations", "x"], "num_generations: 'x': "),
    ):
        refused = dro_rl("study", "run", study.path, *wrong)
        assert refused.exit_code == 2
        assert said in refused.output
    unnamed = dro_rl("study", "run", "--num_generations", "4")
    assert "a study comes first. Name it: `dro-rl study ls`." in unnamed.output


def test_metrics_of_the_log_that_the_dev_split_has_too_are_told_apart() -> None:
    assert {"evidence_bound", "train/answer_logp", "train/recall@3", "rollouts/clean", "ess"} <= set(LOGGED)
    assert "answer_logp" not in LOGGED


def test_a_claim_says_itself_in_words_unless_the_file_does(tmp_path: Path) -> None:
    claims = {
        "a": {"variant": "joint", "against": "frozen", "metric": "em", "by": 2, "type": "2-hop"},
        "b": {"variant": "joint", "test": "never_falls", "metric": "evidence_bound"},
        "c": {"variant": "joint", "against": 0.95, "metric": "rollouts/clean", "says": "It writes well."},
    }
    assert [claim.says for claim in made(tmp_path, claims=claims).claims.values()] == [
        "em of joint on 2-hop is above frozen by 2 or more",
        "evidence_bound of joint never falls from one iteration to the next",
        "It writes well.",
    ]


# Arms -------------------------------------------------------------------------------------------------------


def test_each_variant_has_an_arm_a_seed_but_for_stages_of_others(tmp_path: Path) -> None:
    arms = arms_of(made(tmp_path, seeds=[0, 5]))
    assert [arm.name for arm in arms] == [f"{name}/seed-{seed}" for seed in (0, 5) for name in ("joint", "frozen", "random")]  # fmt: skip # noqa: E501


def test_a_command_trains_what_the_variant_says(tmp_path: Path) -> None:
    """Read back as `dro-rl train` reads it, it is the base recipe with the study's keys and the variant's over it."""
    keys = {"num_generations": 2, "run_name": "of several words: " + "x " * 80 + "'x'", "target_ess": None}
    own = {"selector_learning_rate": 0, "chat_template_kwargs": {"a": [1, "b"]}, "num_generations": 4}
    study = made(tmp_path, keys=keys, variants={"joint": {}, "frozen": own}, seeds=[7])
    arm = arms_of(study)[1]
    assert arm.command[0] == "train"
    path, given = parse_command_line(shlex.split(shlex.join(arm.command[1:])))
    found, expected = load_recipe(path, given).values, load_recipe(study.base).values
    folder = tmp_path / "study" / "frozen" / "seed-7"
    changed = {**keys, **own, "seed": 7, "output_dir": str(folder), "resume_from_checkpoint": "auto"}
    assert found == {**expected, **changed}


def test_a_variant_starts_from_the_models_that_another_with_its_seed_has_kept(tmp_path: Path) -> None:
    common = {"generator_model_name_or_path": "toy", "warmup": "both"}
    more = {"starts_from": "joint", "selector_model_name_or_path": "toy"}
    study = made(tmp_path, keys=common, variants={"joint": {}, "more": more}, claims={}, seeds=[3])
    run, _ = read_keys(study.base, arms_of(study)[1].keys)
    kept = tmp_path / "study" / "joint" / "seed-3"
    assert (run.selector_model_name_or_path, run.generator_model_name_or_path) == ("toy", str(kept / "generator"))
    assert run.warmup == "none"
    assert arms_of(study)[1].needs == kept


def test_a_control_is_evaluated_on_the_dev_split_of_the_training(tmp_path: Path) -> None:
    keys = {"max_eval_samples": 3, "dataset_columns": {"question": "query"}}
    study = made(tmp_path, keys=keys, seeds=[2])
    arm = arms_of(study)[2]
    run = tmp_path / "study" / "joint" / "seed-2"
    assert arm.command == [
        "evaluate", str(run), "--data", str(tmp_path / "world"), "--split", "dev", "--limit", "3",
        "--column", "question=query", "--control", "random", "--seed", "2",
        "--output", str(tmp_path / "study" / "random" / "seed-2"),
    ]  # fmt: skip
    assert arm.needs == run


def test_a_control_of_a_dataset_in_a_folder_of_several_is_evaluated_on_it(tmp_path: Path) -> None:
    """Defect: refused, and with it every study on a folder of real questions."""
    command = arms_of(made(tmp_path, keys={"dataset_config": "nq"}, seeds=[0]))[2].command
    assert command[command.index("--config") + 1] == "nq"


def test_an_arm_is_done_when_its_last_file_is_there(tmp_path: Path) -> None:
    study = made(tmp_path, seeds=[0])
    joint, _, random = arms_of(study)
    assert not joint.done
    leave_arm(joint, [1.0])
    leave_arm(random, [1.0])
    assert joint.done
    assert random.done
    (joint.folder / "trainer_state.json").unlink()
    assert not joint.done


def test_an_arm_that_is_to_go_on_for_longer_is_not_done(tmp_path: Path) -> None:
    leave_arm(arms_of(made(tmp_path))[0], [1.0])
    study = made(tmp_path, keys={"num_iterations": 5})
    longer = arms_of(study)[0]
    assert not longer.done
    check_unchanged(study, [longer])


def test_an_arm_with_other_keys_is_refused_and_not_taken_for_the_one_that_is_asked_for(tmp_path: Path) -> None:
    leave_arm(arms_of(made(tmp_path))[0], [1.0])
    study = made(tmp_path, keys={"num_generations": 2})
    with pytest.raises(InputError, match=r"variants.joint: num_generations: 2: the arm in .* has 4"):
        check_arms(study, arms_of(study))
    assert "num_generations: 2" in dro_rl("study", "show", study.path).output


def test_every_variant_is_checked_as_its_training_would_be_before_any_runs(tmp_path: Path) -> None:
    variants = {"joint": {}, "more": {"starts_from": "joint"}, "deep": {"starts_from": "more", "num_selected": 3}}
    study = made(tmp_path, variants=variants, claims={}, seeds=[0])
    check_arms(study, arms_of(study))
    study = made(tmp_path, variants={**variants, "wide": {"num_selected": 9}}, claims={}, seeds=[0])
    with pytest.raises(InputError, match=r"mine.yaml: variants.wide: num_selected: 9: .*5 documents"):
        check_arms(study, arms_of(study))


# Running ----------------------------------------------------------------------------------------------------

FAKE = """
import os, pathlib, signal, sys, time
words = sys.argv[1:]
folder = pathlib.Path(words[words.index("--output_dir" if "--output_dir" in words else "--output") + 1])
print("iteration 1/2  step 3/8  loss", flush=True)
base = folder.parent.parent
(base / "order.txt").open("a").write(f"{folder.parent.name}/{folder.name} {os.environ['OMP_NUM_THREADS']}\\n")
if folder.parent.name == os.environ.get("FAILS"):
    sys.exit("error: the disk is full")
if "SLEEPS" in os.environ:
    def stop(*_):
        (base / "stopped.txt").open("a").write("whole\\n")
        sys.exit(143)
    signal.signal(signal.SIGTERM, stop)
    (base / "sleeps.txt").write_text("now")
    time.sleep(60)
folder.mkdir(parents=True, exist_ok=True)
(folder / "done.txt").write_text("")
"""


class Heard:
    def __init__(self) -> None:
        self.at_once: list[int] = []
        self._now: set[str] = set()
        self.ends: dict[str, str | None] = {}

    def started(self, arm: Any) -> None:
        self._now.add(arm.name)
        self.at_once.append(len(self._now))

    def running(self, arm: Any, seconds: float) -> None:
        assert arm.name in self._now

    def ended(self, outcome: Any) -> None:
        self._now.discard(outcome.arm.name)
        self.ends[outcome.arm.name] = outcome.wrong


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """In place of `dro-rl`: a program that leaves a file, after which an arm is done."""
    program = tmp_path / "fake.py"
    program.write_text(FAKE)
    monkeypatch.setattr(running, "PROGRAM", (sys.executable, str(program)))
    monkeypatch.setattr("dro_rl.study.arms.Arm.done", property(lambda arm: (arm.folder / "done.txt").is_file()))
    return program


def places(count: int) -> list[dict[str, str]]:
    return [{"OMP_NUM_THREADS": str(i)} for i in range(count)]


def test_arms_run_side_by_side_and_each_after_the_one_it_needs(tmp_path: Path, fake: Path) -> None:
    arms, heard = arms_of(made(tmp_path, seeds=[0, 1])), Heard()
    outcomes = run_arms(arms, places(2), heard)
    assert [outcome.wrong for outcome in outcomes] == [None] * len(arms)
    assert all(arm.done for arm in arms)
    assert max(heard.at_once) == 2
    order = [line.split()[0] for line in (tmp_path / "study" / "order.txt").read_text().splitlines()]
    for seed in (0, 1):
        assert order.index(f"joint/seed-{seed}") < order.index(f"random/seed-{seed}")
    threads = {line.split()[1] for line in (tmp_path / "study" / "order.txt").read_text().splitlines()}
    assert threads == {"0", "1"}


def test_a_failure_stops_those_alone_that_need_it_and_says_its_last_line(
    tmp_path: Path, fake: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAILS", "joint")
    arms, heard = arms_of(made(tmp_path, seeds=[0])), Heard()
    run_arms(arms, places(1), heard)
    assert heard.ends["joint/seed-0"] == f"error: the disk is full ({arms[0].log})"
    assert heard.ends["frozen/seed-0"] is None
    assert heard.ends["random/seed-0"] == "not run: it needs joint/seed-0"
    assert "step 3/8" in arms[0].log.read_text()
    monkeypatch.delenv("FAILS")
    run_arms([arm for arm in arms if not arm.done], places(1), Heard())
    assert all(arm.done for arm in arms)


def test_an_arm_that_ends_well_and_leaves_nothing_has_failed(tmp_path: Path, fake: Path) -> None:
    fake.write_text("print('nothing to do')")
    heard = Heard()
    run_arms(arms_of(made(tmp_path, seeds=[0]))[:1], places(1), heard)
    assert "nothing to do" in str(heard.ends["joint/seed-0"])


STOPPED = """
import sys
from pathlib import Path
from dro_rl.cli import app
from dro_rl.study import check, run
run.PROGRAM = (sys.executable, sys.argv[1])
check.check_arms = lambda *_: None
app(sys.argv[2:])
"""


def test_a_study_that_is_stopped_stops_its_arms_and_waits_for_them(tmp_path: Path, fake: Path) -> None:
    path = study_file(tmp_path, seeds=[0])
    process = subprocess.Popen(
        [sys.executable, "-c", STOPPED, str(fake), "study", "run", str(path), "--jobs", "1"],
        env={**os.environ, "SLEEPS": "1"}, stderr=subprocess.PIPE, text=True, cwd=Path(__file__).parent,
    )  # fmt: skip
    until = time.monotonic() + 120
    while not (tmp_path / "study" / "sleeps.txt").exists() and time.monotonic() < until:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM
    assert "The same command goes on" in said
    assert (tmp_path / "study" / "stopped.txt").read_text() == "whole\n"


@pytest.mark.parametrize(
    ("gpus", "visible", "jobs", "devices"),
    [
        (0, None, None, [None, None]),
        (0, None, 3, [None] * 3),
        (4, None, None, ["0", "1", "2", "3"]),
        (4, None, 2, ["0,2", "1,3"]),
        (2, None, 3, ["0", "1", "0"]),
        (2, "5,7", None, ["5", "7"]),
        (4, None, 1, ["0,1,2,3"]),
    ],
)
def test_places_share_the_gpus_that_are_visible(
    monkeypatch: pytest.MonkeyPatch, gpus: int, visible: str | None, jobs: int | None, devices: list[str | None]
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert [place.get("CUDA_VISIBLE_DEVICES") for place in places_of(jobs)] == devices


def test_cores_are_shared_unless_threads_are_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert {place["OMP_NUM_THREADS"] for place in places_of(2)} == {"4"}
    assert {place["OMP_NUM_THREADS"] for place in places_of(16)} == {"1"}
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert {place["OMP_NUM_THREADS"] for place in places_of(2)} == {"3"}


def test_a_log_says_how_far_its_arm_is(tmp_path: Path) -> None:
    log = tmp_path / "x.log"
    assert (tail(log), how_far(log)) == ("", None)
    log.write_text("iteration 1/3  step 2/90  loss 1\r10%|#\riteration 2/3  step 31/90  loss 1\n\n  the end \n\n")
    assert (tail(log), how_far(log)) == ("the end", (31, 90))


def test_print_gives_the_commands_of_what_is_missing_and_runs_nothing(tmp_path: Path) -> None:
    path = study_file(tmp_path, seeds=[0])
    leave_arm(arms_of(read_study(path))[1], [1.0])
    printed = dro_rl("study", "run", path, "--print")
    assert printed.exit_code == 0, printed.output
    first, second = printed.stdout.splitlines()
    assert first.startswith("dro-rl train ")
    assert second.startswith("dro-rl evaluate ")
    assert second.endswith("# after joint/seed-0")
    assert not (tmp_path / "study" / "joint").exists()


# What is found ----------------------------------------------------------------------------------------------


def test_a_claim_is_judged_by_the_paired_differences_of_its_seeds(tmp_path: Path) -> None:
    study = made(tmp_path)
    leave(study, {"joint": [[1, 1, 1, 0]] * 3, "frozen": [[0, 1, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0]]})
    (judged,) = make_report(study, Results(study)).claims
    assert (judged.a, judged.b) == (pytest.approx(75), pytest.approx(50 / 3))
    assert judged.contrast.difference == pytest.approx(75 - 50 / 3)
    assert judged.contrast.seeds == 3


@pytest.mark.parametrize(
    ("joint", "test", "by", "found"),
    [
        (0.9, "above", 0, "supported"),
        (0.9, "below", 0, "refuted"),
        (0.1, "above", 0, "refuted"),
        (0.1, "below", 10, "supported"),
        (0.9, "above", 60, "refuted"),
    ],
)
def test_far_apart_on_many_questions_is_decided(tmp_path: Path, joint: float, test: str, by: float, found: str) -> None:
    claim = {"variant": "joint", "against": "frozen", "metric": "em", "test": test, "by": by}
    study = made(tmp_path, claims={"it": claim})
    many = 400
    leave(study, {
        name: [[float((i * 7 + seed) % many < many * (share + 0.01 * seed)) for i in range(many)] for seed in range(3)]
        for name, share in (("joint", joint), ("frozen", 0.5))
    })  # fmt: skip
    (judged,) = make_report(study, Results(study)).claims
    assert judged.verdict == judged.words == found


def test_one_run_decides_nothing_and_two_like_runs_say_how_many_more(tmp_path: Path) -> None:
    study = made(tmp_path)
    leave(study, {"joint": [[1.0] * 40], "frozen": [[0.0] * 40]})
    assert make_report(study, Results(study)).claims[0].words == "undecided: one run decides nothing"
    leave(study, {"joint": [[1.0] * 20 + [0.0] * 20, [1.0] * 26 + [0.0] * 14], "frozen": [[1.0, 0.0] * 20] * 2})
    (judged,) = make_report(study, Results(study)).claims
    assert judged.verdict == "undecided"
    assert judged.words.startswith("undecided")
    assert judged.contrast.seeds == 2


def test_seeds_that_one_side_lacks_are_not_compared(tmp_path: Path) -> None:
    study = made(tmp_path)
    leave(study, {"joint": [[1, 0]] * 3, "frozen": [[0, 0]] * 2})
    report = make_report(study, Results(study))
    assert report.claims[0].contrast.seeds == 2
    assert report.means["joint"]["em"].seeds == 3
    assert "frozen/seed-2" in report.missing
    assert made(tmp_path).claims["learns"].level == 0.05


def test_claims_are_corrected_together(tmp_path: Path) -> None:
    claim = {"variant": "joint", "against": "frozen", "metric": "em"}
    ems = {
        "joint": [[1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 1, 1]],
        "frozen": [[0, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 1]],
        "random": [[1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 1, 1]],
    }
    alone = made(tmp_path, claims={"a": claim})
    leave(alone, ems)
    (one,) = make_report(alone, Results(alone)).claims
    both = made(tmp_path, claims={"a": claim, "b": {**claim, "against": "random"}})
    first, second = make_report(both, Results(both)).claims
    least = min(first.contrast.p_value, second.contrast.p_value)
    assert one.adjusted == one.contrast.p_value
    assert min(first.adjusted, second.adjusted) == pytest.approx(2 * least)


def test_types_stages_and_numbers_are_what_a_claim_is_about(tmp_path: Path) -> None:
    claims = {
        "two": {"variant": "joint", "against": 10, "metric": "em", "type": "2-hop"},
        "from": {"variant": "joint", "against": "start", "metric": "em"},
        "when": {"variant": "joint", "against": "frozen", "metric": "em", "stage": "iteration-2"},
    }
    study = made(tmp_path, claims=claims)
    leave(study, {"joint": [[0, 0, 0, 0]] * 3}, stage="base")
    for name, em in (("joint", [1, 1, 0, 0]), ("frozen", [1, 1, 1, 0])):
        leave(study, {name: [em] * 3}, stage="iteration-2")
    leave(study, {"joint": [[0, 1, 0, 1]] * 3, "frozen": [[0] * 4] * 3})
    two, start, when = make_report(study, Results(study)).claims
    assert (two.a, two.b, two.contrast.difference) == (100, 10, 90)
    assert (start.a, start.b) == (50, 0)
    assert (when.a, when.b) == (50, 75)


@pytest.mark.parametrize(
    ("claim", "said"),
    [
        ({"stage": "iteration-1"}, "this is an evaluation of the run, which has base, final"),
        ({"type": "3-hop"}, "1-hop, 2-hop"),
    ],
)
def test_a_stage_or_a_type_that_is_nowhere_is_one_line(tmp_path: Path, claim: dict[str, str], said: str) -> None:
    study = made(tmp_path, claims={"it": {"variant": "joint", "against": 1, "metric": "em", **claim}})
    leave(study, {"joint": [[1, 0]]})
    shown = dro_rl("study", "show", study.path)
    assert shown.exit_code == 2
    assert f"{study.path}: claims.it: " in shown.output
    assert said in shown.output


def test_what_never_falls_is_judged_by_its_deepest_change(tmp_path: Path) -> None:
    assert deepest_change([1.0, 3.0, 2.5, 4.0]) == -0.5
    assert deepest_change([1.0, 1.5, 3.0]) == 0.5
    claims = {
        "up": {"variant": "joint", "test": "never_falls", "metric": "em"},
        "down": {"variant": "frozen", "test": "never_falls", "metric": "em"},
    }
    study = made(tmp_path, claims=claims)
    leave(study, {"joint": [[1, 0]] * 3, "frozen": [[1, 0]] * 3})
    stages = {"joint": [10, 20, 31], "frozen": [10, 30, 20]}
    for arm in arms_of(study):
        if arm.variant.name in stages:
            values = [value + arm.seed * i for i, value in enumerate(stages[arm.variant.name])]
            known = ["base", "iteration-1", "iteration-2", "final"]
            summary = [{"stage": s, "em": v} for s, v in zip(known, [*values, 0], strict=True)]
            (arm.folder / "evaluation" / "summary.json").write_text(json.dumps({"stages": summary}))
    up, down = make_report(study, Results(study)).claims
    assert up.contrast.difference == pytest.approx(11.0)
    assert up.verdict == "supported"
    assert down.contrast.difference == pytest.approx(-9.0)
    assert down.verdict == "refuted"


def test_a_warm_up_is_where_training_begins(tmp_path: Path) -> None:
    study = made(tmp_path)
    leave(study, {"joint": [[1, 0]]})
    summary = [{"stage": s, "em": v} for s, v in (("base", 90), ("warmup", 10), ("iteration-1", 20), ("final", 5))]
    (arms_of(study)[0].folder / "evaluation" / "summary.json").write_text(json.dumps({"stages": summary}))
    assert Results(study).series("joint", "em") == {0: [10, 20]}


def test_figures_of_rollouts_are_those_of_the_last_tenth_of_the_iterations(tmp_path: Path, job: Any) -> None:
    """A real training: its log, iteration by iteration, and at its end."""
    from dro_rl.rollouts.diagnostics import logged
    from dro_rl.rollouts.read import history

    study = made(tmp_path / "s", variants={"joint": {}}, claims={}, metrics=["em", "evidence_bound"], seeds=[0])
    run = job("run", seed=0)
    folder = arms_of(study)[0].folder
    folder.parent.mkdir(parents=True)
    run.rename(folder)
    expected = [logged(iteration.rollouts) for iteration in history(folder)]
    write_recipe(arms_of(study)[0])
    results = Results(study)
    assert results.series("joint", "evidence_bound") == {0: [figures["evidence_bound"] for figures in expected]}
    assert results.values("joint", "train/recall@3")[0].value == expected[-1]["recall@3"]
    assert results.values("joint", "ess", stage="iteration-1")[0].value == expected[0]["ess"]
    with pytest.raises(InputError, match="this run has iterations 1-2"):
        results.values("joint", "ess", stage="iteration-3")


def test_gradients_are_read_as_they_were_measured(tmp_path: Path) -> None:
    variants = {"m1": {"measure": "gradients"}, "m8": {"measure": "gradients"}}
    claim = {"variant": "m8", "test": "below", "against": "m1", "metric": "gradient_variance@rollouts"}
    study = made(tmp_path, variants=variants, claims={"less": claim})
    for arm in arms_of(study):
        arm.folder.mkdir(parents=True)
        value = {"m1": 10.0, "m8": 4.0}[arm.variant.name] + 0.1 * arm.seed
        values = {**dict.fromkeys(GRADIENTS, None), "gradient_variance@rollouts": value}
        (arm.folder / "gradients.json").write_text(json.dumps(values))
    report = make_report(study, Results(study))
    assert report.claims[0].verdict == "supported"
    assert report.claims[0].contrast.difference == pytest.approx(-6.0)
    assert list(report.means["m1"]) == ["gradient_variance@rollouts"]


def test_a_study_of_which_nothing_has_run_is_shown_as_that(tmp_path: Path) -> None:
    path = study_file(tmp_path, seeds=list(range(6)), variants={"joint": {}, "frozen": {}, "random": {}}, claims={})
    shown = dro_rl("study", "show", path)
    assert shown.exit_code == 0, shown.output
    assert "not run to the end: joint/seed-0, frozen/seed-0, random/seed-0, " in shown.output
    assert " and 12 more\n" in shown.output
    path = study_file(tmp_path)
    shown = dro_rl("study", "show", path)
    assert "undecided: not run" in shown.output
    assert json.loads((tmp_path / "study" / "report.json").read_text())["claims"][0]["a"] is None


def test_show_writes_what_it_says(tmp_path: Path) -> None:
    path = study_file(tmp_path)
    study = read_study(path)
    leave(study, {"joint": [[1, 1, 1, 0]] * 3, "frozen": [[0, 0, 0, 0]] * 3, "random": [[0, 1, 0, 0]] * 3})
    shown = dro_rl("study", "show", path)
    assert shown.exit_code == 0, shown.output
    assert "What is claimed" in shown.output
    assert (tmp_path / "study" / "report.png").read_bytes().startswith(b"\x89PNG")
    report = json.loads((tmp_path / "study" / "report.json").read_text())
    assert report["means"]["joint"]["em"]["mean"] == 75
    assert report["missing"] == []
    page = (tmp_path / "study" / "report.md").read_text()
    assert "| joint | 3 | 75.00 [75.00 … 75.00] |" in page
    found = json.loads(dro_rl("study", "show", path, "--json").stdout)
    assert found["claims"][0]["verdict"] == report["claims"][0]["verdict"]


def test_a_page_keeps_everything_but_the_studys_own_section(tmp_path: Path) -> None:
    study = made(tmp_path)
    page = tmp_path / "evidence.md"
    page.write_text("# Evidence\n\nWords.\n")
    write_section(page, make_report(study, Results(study)))
    once = page.read_text()
    assert once.startswith("# Evidence\n\nWords.\n\n<!-- study mine -->\n## mine\n")
    page.write_text(once + "\nMore words.\n")
    leave(study, {"joint": [[1, 1]] * 3, "frozen": [[0, 0]] * 3})
    report = make_report(study, Results(study))
    write_section(page, report)
    twice = page.read_text()
    assert twice.count("## mine") == 1
    assert to_markdown(report) in twice
    assert twice.endswith("\nMore words.\n")


def test_shipped_studies_are_listed_by_what_they_ask() -> None:
    listed = dro_rl("study", "ls").stdout
    assert {line.split()[0] for line in listed.splitlines()} == set(names(STUDIES))


def test_machines_are_those_that_trained_wherever_they_were_sent(tmp_path: Path) -> None:
    """`--print` notes none: a cluster's jobs say in their runs where they ran."""
    study = made(tmp_path)
    assert make_report(study, Results(study)).machines == []
    for arm, name in zip(arms_of(study), ("8 cores", "16 cores", None), strict=False):
        arm.folder.mkdir(parents=True)
        sessions = [{"machine": "8 cores"}, {"machine": name} if name else {}]
        (arm.folder / "run.json").write_text(json.dumps({"inputs": {}, "sessions": sessions}))
    assert make_report(study, Results(study)).machines == ["16 cores", "8 cores"]
    note_machine(study.output_dir)
    assert make_report(study, Results(study)).machines == [this_machine(), "16 cores", "8 cores"]


@pytest.mark.slow
def test_a_study_runs_from_its_file_to_its_verdicts(tmp_path: Path) -> None:
    """Real trainings, a control, and gradients, on the little world, each in a process of its own."""
    variants = {
        "joint": {"num_iterations": 1},
        "random": {"of": "joint", "control": "random"},
        "grads": {"measure": "gradients"},
    }
    claims = {
        "chance": {"variant": "joint", "against": "random", "metric": "em"},
        "noise": {"variant": "grads", "test": "above", "against": 0, "metric": "gradient_variance"},
    }
    path = study_file(tmp_path, variants=variants, claims=claims, seeds=[0, 1])
    done = subprocess.run(
        [sys.executable, "-m", "dro_rl", "study", "run", str(path), "--jobs", "2"],
        capture_output=True, text=True, timeout=500, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(dro_rl("study", "show", path, "--json").stdout)
    assert report["missing"] == []
    assert [claim["contrast"]["seeds"] for claim in report["claims"]] == [2, 2]
    assert report["machines"]
    rows = yaml.safe_load((tmp_path / "study" / "joint" / "seed-1" / "recipe.yaml").read_text())
    assert rows["seed"] == 1
    assert not math.isnan(report["means"]["grads"]["gradient_variance"]["mean"])
    again = dro_rl("study", "run", path)
    assert "0 to run" in again.output


def test_a_table_wider_than_the_terminal_comes_in_parts_of_whole_cells() -> None:
    head = ("variant", "seeds", "em", "recall", "gradient_variance")
    rows = [("joint", "3", "1.00 [0.50 … 1.50]", "2.00 [1.00 … 3.00]", "–"), ("gradient", "3", "–", "–", "5.00")]
    (whole,) = study_commands._that_fit(head, rows, 100)
    assert whole == ([*head], [[*row] for row in rows])
    parts = list(study_commands._that_fit(head, rows, 40))
    assert [part[0][2:] for part in parts] == [["em"], ["recall"], ["gradient_variance"]]
    assert [[row[0] for row in part[1]] for part in parts] == [["joint"], ["joint"], ["gradient"]]
    assert parts[2][1] == [["gradient", "3", "5.00"]]
    assert list(study_commands._that_fit(head[:2], [("joint", "3")], 10)) == [(["variant", "seeds"], [["joint", "3"]])]
