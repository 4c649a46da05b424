"""How a run's questions were shaped: which candidates its selector was trained to read, and in which order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dro_rl.data.candidates import shape_candidates
from dro_rl.keys import keys_of
from dro_rl.keys.run import RunConfig
from dro_rl.keys.training import TrainingKeys
from dro_rl.recipe.files import read_recipe
from dro_rl.records import Question


@dataclass(frozen=True)
class Shape:
    """What is done to candidates before a pair reads them, as training does it to those of its dev split.

    Args:
        num_documents: the first so many are kept; None keeps all.
        shuffle_seed: they are shuffled by it; None leaves them in the retriever's order.
        source: the recipe that says so; empty where none does.
    """

    num_documents: int | None = None
    shuffle_seed: int | None = None
    source: str = ""

    def apply(self, questions: Sequence[Question]) -> list[Question]:
        """The questions, shaped."""
        return shape_candidates(questions, self.num_documents, shuffle_seed=self.shuffle_seed)

    def __str__(self) -> str:
        done = [f"the first {self.num_documents}"] if self.num_documents is not None else []
        done += [f"shuffled by seed {self.shuffle_seed}"] if self.shuffle_seed is not None else []
        said = f", as {self.source} says" if self.source else ""
        return f"{', '.join(done)}{said}" if done else "as the file has them"


def shape_of(run: Path, recipe: Path | None, num_documents: int | None, shuffle: bool | None) -> Shape:
    """The shape of a run's recipe, of which what is asked for otherwise is left out.

    Args:
        run: the run's folder; one without `recipe.yaml` shapes nothing.
        recipe: another recipe, in its place.
        num_documents, shuffle: what was asked for; None leaves it to the recipe.

    Raises:
        InputError: the recipe cannot be read, or one of these keys breaks its rule.
    """
    path = recipe or run / "recipe.yaml"
    given = read_recipe(path) if recipe is not None or path.is_file() else {}
    keys = {**keys_of(RunConfig), **keys_of(TrainingKeys)}
    count, by_recipe, seed = (
        keys[name].check(given.get(name, keys[name].default)) for name in ("num_documents", "shuffle_documents", "seed")
    )
    from_recipe = (num_documents is None and count is not None) or (shuffle is None and by_recipe)
    return Shape(
        num_documents=count if num_documents is None else num_documents,
        shuffle_seed=seed if (by_recipe if shuffle is None else shuffle) else None,
        source=path.name if from_recipe else "",
    )
