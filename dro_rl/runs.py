"""A run's folder as whoever comes later finds it: where it stands, what was measured, what it keeps. Reads files alone.

`recipe.yaml` has every key as the run has it, `run.json` what it reads and each time that it was started, with what
was said at the end of those that came to it; `evaluation/` and `rollouts/` are read by their rooms.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypedDict, cast

from dro_rl.errors import InputError, Phrase
from dro_rl.evaluation.stages import FINAL, best_stage, read_stages
from dro_rl.flat_yaml import read_yaml
from dro_rl.keys.reference import KEYS
from dro_rl.locks import LOCK, owner_of
from dro_rl.records import Question
from dro_rl.rollouts import log
from dro_rl.rows.small import fits, read_object, record

RECIPE = "recipe.yaml"
RECORD = "run.json"
"""In a run's folder: hashes of what it reads, and what computed it, each time that it was started."""
STATE = "trainer_state.json"
"""In a run's folder once it has ended, and in each checkpoint: what was logged."""


class SignalSpan(TypedDict):
    """A signal of a run: when it stood, what was measured at the end, which keys to turn, whether it stood then."""

    name: str
    iterations: str
    reading: str
    keys: list[str]
    stands: bool


@dataclass(frozen=True)
class Ending:
    """What a job says when it has come to its end.

    Args:
        at: when, in ISO 8601.
        kept: the stage whose weights were exported.
        rates: `time/<phase>` in seconds, `tokens_per_second/<phase>`, `mfu/<phase>`, of the main process.
        signals: every signal that stood at some time.
    """

    at: str
    kept: str
    rates: dict[str, float]
    signals: list[SignalSpan] = field(default_factory=list)


@dataclass(frozen=True)
class Run:
    """A run's folder.

    Args:
        path: the folder.
        state: `finished`; before that `running`, which is owned by a job, or `stopped`.
        owner: the job that works there, in words; None where none does.
        recipe: every key with its value.
        iteration: the last one that has rollouts; 0 before the first.
        stages: evaluated so far, in order; see `dro_rl.evaluation.stages`.
        standing: names of the signals that stood when it last logged.
        ending: what was said at the end; None before it.
    """

    path: Path
    state: Literal["running", "finished", "stopped"]
    owner: str | None
    recipe: Mapping[str, Any]
    iteration: int
    stages: list[dict[str, Any]]
    standing: list[str]
    ending: Ending | None

    @property
    def iterations(self) -> int:
        """How many the recipe asks for."""
        return int(self.recipe["num_iterations"])

    @property
    def kept(self) -> str | None:
        """The stage whose weights were exported; before the end the one that would be now; None before the first."""
        if self.ending is not None:
            return self.ending.kept
        if self.recipe["load_best_model_at_end"]:
            return best_stage(self.stages, str(self.recipe["metric_for_best_model"]), self.more_is_better)
        return next((stage["stage"] for stage in reversed(self.stages) if stage["stage"] != FINAL), None)

    @property
    def more_is_better(self) -> bool:
        """Of the metric that decides."""
        return bool(self.recipe["greater_is_better"])


def runs_in(folder: str | Path) -> list[Path]:
    """The folders of runs at and below a folder, by name. There are none within a run.

    Raises:
        InputError: there is no such folder.
    """
    if not Path(folder).is_dir():
        raise InputError(str(folder), Phrase("no such folder"), "runs lie in and below a folder", "Check the path.")
    return sorted(_runs_in(Path(folder)))


def _runs_in(folder: Path) -> Iterator[Path]:
    for place, folders, _ in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        if is_run(Path(place)):
            folders.clear()
            yield Path(place)


def is_run(folder: Path) -> bool:
    """Whether a job has begun there. A recipe alone may be anybody's."""
    traces = (RECORD, STATE, "rollouts", "evaluation")
    return (folder / RECIPE).is_file() and any((folder / name).exists() for name in traces)


def read_run(folder: str | Path) -> Run:
    """What a run's folder says.

    Raises:
        InputError: it is no run's, or a file in it is not as a run wrote it.
    """
    folder = Path(folder)
    if not is_run(folder):
        found = "no run" if folder.is_dir() else "no such folder"
        raise InputError(
            str(folder), Phrase(found), "a run is the output_dir of a training", "`dro-rl runs ls DIR` lists them."
        )
    stages, owner = read_stages(folder), owner_of(folder / LOCK)
    complete = (folder / STATE).is_file() and any(stage["stage"] == FINAL for stage in stages)
    ending = _ending(folder / RECORD) if complete else None
    finished = complete and (owner is None or ending is not None)  # else it is begun again, to go on for longer
    return Run(
        path=folder,
        state="finished" if finished else "stopped" if owner is None else "running",
        owner=owner,
        recipe=recipe_of(folder),
        iteration=max(log.parts(folder), default=0),
        stages=stages,
        standing=_standing(folder, finished),
        ending=ending,
    )


def recipe_of(folder: Path) -> dict[str, Any]:
    """Every key of a run's recipe with its value: the default, for those that there were not when it began."""
    return {name: key.default for name, key in KEYS.items()} | read_yaml(folder / RECIPE)


def questions_of(run: Run) -> list[Question]:
    """The training questions of a run, of the data that its recipe names, with all their candidates in their order.

    Raises:
        InputError: the data is not there any more, or not as it was; a hub is not asked.
    """
    from dro_rl.data import load_questions  # half a second that looking at a run has no use for
    from dro_rl.keys.run import RunConfig

    keys = RunConfig(**{name: value for name, value in run.recipe.items() if name in RunConfig.__dataclass_fields__})
    if keys.dataset_name != "toy" and not Path(keys.dataset_name).expanduser().exists():
        raise InputError(
            "dataset_name", keys.dataset_name, "it is on this machine", "Put it there, or begin elsewhere."
        )
    return load_questions(
        keys.dataset_name,
        keys.dataset_train_split,
        config=keys.dataset_config,
        limit=keys.max_train_samples,
        columns=keys.dataset_columns,
    )


def record_of(folder: Path) -> tuple[dict[str, dict[str, str]], dict[str, str]]:
    """What `run.json` says: by key, hashes of the parts of what it names; and the versions of the last start.

    Raises:
        InputError: there is none, or it is not as a run wrote it.
    """
    path = folder / RECORD
    fix = "Use the folder of a run that this release, or a later one, began."
    if not path.is_file():
        raise InputError(str(path), Phrase("no such file"), "a run says there what it reads", fix)
    run = read_object(path, "the record of a run", fix)
    sessions = run.get("sessions")
    versions = sessions[-1].get("versions") if fits(sessions, list[dict[str, Any]]) and sessions else None
    if fits(run.get("inputs"), dict[str, dict[str, str]]) and fits(versions, dict[str, str]):
        return run["inputs"], cast(dict[str, str], versions)
    raise InputError(str(path), Phrase("other fields"), "this is as a run wrote it", fix)


def differences(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """The names under which something else stands now, or nothing, or something where nothing stood."""
    return sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))


def disk_of(folder: Path) -> int:
    """Bytes of all files in a folder. Those that go meanwhile are no matter."""
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.lstat(os.path.join(place, name)).st_size
            except FileNotFoundError:
                continue
    return total


def checkpoints_of(run: Path) -> list[Path]:
    """The checkpoints that are in place in a run's folder, by step."""
    found = {place: re.fullmatch(r"checkpoint-(\d+)", place.name) for place in run.glob("checkpoint-*")}
    return sorted((place for place, name in found.items() if name), key=step_of)


def step_of(checkpoint: Path) -> int:
    """How many optimizer steps led to a checkpoint."""
    return int(checkpoint.name.removeprefix("checkpoint-"))


def _ending(path: Path) -> Ending | None:
    """What the last start came to; None where it was killed, or before `run.json` said so."""
    if not path.is_file():
        return None
    what, fix = "the record of a run", "Delete it, if all that the run reads is as it was."
    match read_object(path, what, fix):
        case {"sessions": [*_, {"ended": {**ended}}]}:
            return record(Ending, cast(dict[str, Any], ended), f"{path}: ended", what, fix)
    return None


def logs_of(folder: Path, finished: bool) -> Iterator[list[dict[str, Any]]]:
    """What a run logged, an entry a step: until its end, or its last checkpoint, then until those before.

    Args:
        finished: whether it has ended; else what lies in its folder may be of an earlier end, and comes last.

    Raises:
        InputError: a file is not as a run wrote it.
    """
    places = [place / STATE for place in reversed(checkpoints_of(folder))]
    for path in [folder / STATE, *places] if finished else [*places, folder / STATE]:
        if path.is_file():
            logged = read_object(path, "a trainer's state", "Delete it.").get("log_history")
            yield [entry for entry in logged if isinstance(entry, dict)] if isinstance(logged, list) else []


def _standing(folder: Path, finished: bool) -> list[str]:
    """The signals that stood when the run last logged some."""
    for logged in logs_of(folder, finished):
        for entry in reversed(logged):
            signals = {name: value for name, value in entry.items() if name.startswith("signals/")}
            if signals:
                return [name.removeprefix("signals/") for name, value in signals.items() if value]
    return []
