"""Claims about questions that teach nothing in jobs of two processes: what is left out of the selector's pass changes
nothing, also where that leaves a process with nothing to do while the other works."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from training_world import largest_difference, launch, weights, world

SCRIPT = str(Path(__file__).parent / "watched_job.py")
NAMES = ("loss", "selector/loss", "generator/loss", "selector/grad_norm", "generator/grad_norm", "evidence_bound")
"""What the step log says of values, gradients and scale."""


def steps(run: Path) -> list[dict[str, float]]:
    return [e for e in json.loads((run / "trainer_state.json").read_text())["log_history"] if "loss" in e]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "keys"),
    [("ddp", {"questions_per_iteration": 8}), ("fsdp2", {"questions_per_iteration": 4})],
    ids=["ddp, scored first", "fsdp2, fused"],
)
def test_two_processes_that_leave_questions_out_train_as_two_that_do_not(
    tmp_path: Path, config: str, keys: dict[str, int]
) -> None:
    """With two rollouts of one document each many questions tie, and a pass holds one question."""
    settings = {
        "num_iterations": 2, "num_generations": 2, "num_selected": 1, "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2, **keys,
    }  # fmt: skip
    recipe = world(tmp_path / "world", **settings)
    finished = {}
    for name, bound in (("lean", "1e-12"), ("whole", "0")):
        finished[name] = launch(recipe, tmp_path / name, processes=2, config=config, job=(SCRIPT, bound))
        assert finished[name].returncode == 0, finished[name].stderr[-3000:]
    said = {name: re.findall(r"pass of process (\d): (\w+), skips (\d+)", job.stdout) for name, job in finished.items()}
    assert {skipped for _, _, skipped in said["whole"]} == {"0"}
    assert {(rank, "idle") for rank in "01"} <= {(rank, how) for rank, how, _ in said["lean"]}
    passes = [[how for rank, how, _ in said["lean"] if rank == own] for own in "01"]
    assert any(one != other for one, other in zip(*passes, strict=True)), "one is idle while the other works"
    assert largest_difference(weights(tmp_path / "lean"), weights(tmp_path / "whole")) < 1e-6
    for lean, whole in zip(steps(tmp_path / "lean"), steps(tmp_path / "whole"), strict=True):
        assert {name: lean[name] for name in NAMES} == pytest.approx({name: whole[name] for name in NAMES}, abs=1e-6)
    assert sum(step["selector/tokens_skipped"] for step in steps(tmp_path / "lean")) > 0
