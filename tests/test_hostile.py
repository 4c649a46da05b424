"""Claims about what nobody should write: into a recipe, into YAML, on a command line, by hand into a run's files.

Each comes to a result or to one error that names the place. `benchmarks/hostile_settings.py` and `hostile_commands.py`
try every value with every key and every command; here is what takes seconds.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
import yaml

from benchmarks.hostile_commands import build_world, command_lines, commands, hostile_arguments, verdict
from benchmarks.hostile_settings import LEAST, as_job, hostile_values
from dro_rl.errors import InputError
from dro_rl.files import written_whole
from dro_rl.flat_yaml import MAX_BYTES
from dro_rl.job import launch
from dro_rl.keys.inherited import REFUSED, WITHOUT_EFFECT
from dro_rl.keys.reference import KEYS
from dro_rl.pipeline import read_settings
from dro_rl.recipe import load_recipe, parse_command_line, read_keys


def refusal(read: Callable[[], Any]) -> str:
    """The error that reading comes to, in one line that is not a page; nothing where it is read. No other exception."""
    try:
        read()
    except InputError as error:
        found = str(error)
    else:
        return ""
    assert len(found) < 1000
    return found


# Values ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", [*KEYS, *WITHOUT_EFFECT, *REFUSED])
def test_a_value_is_accepted_or_refused_in_a_line_that_names_the_key(key: str) -> None:
    accepted = []
    for value in hostile_values():
        error = refusal(lambda value=value: read_keys(None, {**LEAST, key: value}))
        assert not error or key in error
        if not error:
            accepted.append(value)
    for value in Random(key).sample(accepted, min(3, len(accepted))):
        error = refusal(lambda value=value: load_recipe(None, {**LEAST, key: value}))
        assert not error or key in error


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("seed", -1),
        ("seed", 2**32),
        ("log_level", "verbose"),
        ("optim", "galore_adamw"),
        ("optim_args", "momentum"),
        ("use_liger_kernel", True),
        ("neftune_noise_alpha", 5.0),
        ("fsdp", "full_shard"),
        ("deepspeed", "foo.json"),
        ("torch_compile", True),
        ("accelerator_config", {"split_batches": True}),
        ("selector_lora_r", 2**31),
        ("lora_alpha", 10**12),
        ("ddp_backend", "mpi"),
        ("lr_scheduler_type", "reduce_lr_on_plateau"),
        ("lr_scheduler_kwargs", {"min_lr_rate": float("inf")}),
        ("hub_token", "hf_secret"),
        ("logging_steps", 1.5),
        ("adam_beta2", 1.0),
        ("chat_template_kwargs", {"a": float("nan")}),
        ("output_dir", "a\0b"),
        ("run_name", "x" * 300),
        ("gradient_checkpointing_kwargs", {"use_reentrant": True}),
    ],
)
def test_what_would_crash_later_is_refused_as_a_recipe(key: str, value: Any) -> None:
    with pytest.raises(InputError) as caught:
        load_recipe(None, {**LEAST, key: value})
    assert caught.value.place == key


@pytest.mark.parametrize("key", [name for name, key in KEYS.items() if key.kind in (float, float | None)])
@pytest.mark.parametrize("value", ["inf", "-inf", "nan", "1e999", float("inf"), float("nan"), 10**400])
def test_no_number_is_infinite(key: str, value: Any) -> None:
    with pytest.raises(InputError, match=f"^{key}: "):
        load_recipe(None, {**LEAST, key: value})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("key", "value", "comes_to"),
    [
        ("seed", 2**32 - 1, "trained"),
        ("full_determinism", True, "trained"),
        ("max_grad_norm", 0, "trained"),
        ("save_steps", 0.5, "trained"),
        ("optim", "adafactor", "trained"),
        ("ddp_backend", "gloo", "trained"),
        ("lr_scheduler_type", "cosine_with_min_lr", "refused"),
        ("optim", "paged_adamw_8bit", "trained"),
        ("max_steps", 2**40, "refused"),
    ],
)
def test_what_a_recipe_may_say_trains_or_is_refused_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str, value: Any, comes_to: str
) -> None:
    monkeypatch.chdir(tmp_path)
    verdict, words = as_job(key, value, tmp_path / "job", seconds=60)
    assert verdict == comes_to, words


# YAML --------------------------------------------------------------------------------------------------------

BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{new}: &{new} [{','.join([f'*{old}'] * 9)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)
WRONG = {
    "a date under a tag": "run_name: !!timestamp 2024-13-45",
    "an object of Python's": "run_name: !!python/object/apply:os.system [ls]",
    "a key that is a list": "? [a, b]\n: 1",
    "a key that is a dictionary": "? {a: 1}\n: 1",
    "a key that is a number": "1: 1",
    "5,000 digits": f"seed: {'9' * 5000}",
    "a number in eights": "seed: 010",
    "a number in sixties": "seed: 1:30",
    "500 levels": f"chat_template_kwargs: {'[' * 500}{']' * 500}",
    "a thousand levels by indentation": "a:\n" + "".join(f"{' ' * n}a:\n" for n in range(1, 1000)),
    "names of names of names": BOMB,
    "a name for a dictionary": "chat_template_kwargs: &x {a: 1}\ndataset_columns: *x",
    "a name within itself": "chat_template_kwargs: &x {a: *x}",
    "a name that is not there": "run_name: *nobody",
    "two documents": "seed: 1\n---\nseed: 2",
    "half a surrogate": 'run_name: "\\ud800"',
    "a character that is none": 'run_name: "\\U00110000"',
    "a NUL": "run_name: a\0b",
    "another version": "%YAML 9.0\n---\nseed: 1",
    "a key twice, within": "chat_template_kwargs: {a: 1, a: 2}",
    "a megabyte": "run_name: " + "x" * MAX_BYTES,
    "a quote that is not closed": 'run_name: "x',
}


@pytest.mark.parametrize("case", WRONG)
def test_yaml_that_is_no_recipe_is_refused_with_its_file_or_its_key(tmp_path: Path, case: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(LEAST) + WRONG[case] + "\n", encoding="utf-8")
    with pytest.raises(InputError) as caught:
        load_recipe(path)
    assert str(path) in caught.value.place or caught.value.place in KEYS
    assert len(str(caught.value)) < 1000


def test_dates_and_what_looks_like_a_tag_are_text(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(LEAST) + "run_name: 2024-13-45\nproject: '!!int'\n")
    run = load_recipe(path).values
    assert (run["run_name"], run["project"]) == ("2024-13-45", "!!int")


def test_a_name_stands_for_one_value(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(LEAST) + "selector_learning_rate: &rate 1e-4\ngenerator_learning_rate: *rate\n")
    assert load_recipe(path).training.generator_learning_rate == 1e-4


@pytest.mark.parametrize("seed", range(150))
def test_a_recipe_with_bytes_changed_is_a_recipe_or_refused(tmp_path: Path, seed: int) -> None:
    """Characters of YAML's own put in, lines doubled, taken out and cut."""
    random = Random(seed)
    source = (Path(__file__).parent.parent / "recipes" / "quickstart.yaml").read_bytes()
    for _ in range(random.randint(1, 4)):
        place, length = random.randrange(len(source)), random.randint(0, 40)
        inserted = random.choice(
            [
                b"",
                b"\t",
                b"&a ",
                b"*a",
                b"!!int ",
                b"{",
                b"[",
                b"'",
                b'"',
                b"- ",
                b"? ",
                b": ",
                b"| ",
                b"%",
                b"\xff",
                b"\0",
            ]
        )
        source = source[:place] + inserted + source[place + length :]
    path = tmp_path / "recipe.yaml"
    path.write_bytes(source)
    refusal(lambda: read_keys(path))


@pytest.mark.parametrize(
    "value", ["[" * 500, "!!python/object:x {}", "&a [*a]", "9" * 5000, "{a: 1, a: 2}", "2024-13-45", "\ud800"]
)
def test_a_value_on_the_command_line_is_read_like_a_files(value: str) -> None:
    error = refusal(lambda: load_recipe(None, {**LEAST, **parse_command_line(["--run_name", value])[1]}))
    assert not error or "run_name" in error


# Command lines and run folders -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, ...]]:
    """A good line for each command, in a world with a trained run."""
    return build_world(tmp_path_factory.mktemp("commands"))


@pytest.mark.slow
@pytest.mark.parametrize("name", commands())
def test_a_command_line_with_one_thing_wrong_ends_in_a_line(
    good: dict[str, tuple[str, ...]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Eight of each command's; those that would start a job stop before it."""
    monkeypatch.chdir(tmp_path)
    launched: list[Any] = []
    monkeypatch.setattr(launch, "launch_job", lambda *arguments, **options: launched.append(arguments) or 0)
    folder = Path(good["data check"][0]).parent
    lines = list(command_lines(name, commands()[name], good[name], hostile_arguments(folder)))
    for line in Random(name).sample(lines, min(8, len(lines))):
        found, words = verdict(line)
        assert found != "traceback", (line, words)


@pytest.mark.slow
@pytest.mark.parametrize(
    "content", [b"", b"[]", b"null", b"{}", b'{"num_selected": 1e9}', b"\xff" * 9, b'{"a": ' * 99_999]
)
@pytest.mark.parametrize("command", ["ask", "evaluate"])
def test_a_damaged_pipeline_json_is_one_line(
    good: dict[str, tuple[str, ...]], tmp_path: Path, command: str, content: bytes
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "pipeline.json").write_bytes(content)
    line = (command, str(run), *good[command][1:])
    found, words = verdict(line)
    assert found == "refused", words
    assert "pipeline.json" in words


def test_a_value_of_pipeline_json_obeys_the_rule_of_its_key(tmp_path: Path) -> None:
    settings = {
        "num_selected": 2, "max_prompt_length": 64, "max_completion_length": 8, "max_answer_length": 4,
        "chat_template_kwargs": {}, "constrain_selection": False,
    }  # fmt: skip
    for name, value in (("num_selected", 0), ("max_answer_length", -3), ("constrain_selection", "no")):
        (tmp_path / "pipeline.json").write_text(json.dumps({**settings, name: value}))
        with pytest.raises(InputError, match=f"pipeline.json: {name}: "):
            read_settings(tmp_path)


# Links -------------------------------------------------------------------------------------------------------


def test_a_link_where_a_file_is_prepared_is_not_followed(tmp_path: Path) -> None:
    target = tmp_path / "precious"
    target.write_text("mine")
    (tmp_path / ".recipe.yaml.tmp").symlink_to(target)
    with written_whole(tmp_path / "recipe.yaml") as beside:
        beside.write_text("new")
    assert (target.read_text(), (tmp_path / "recipe.yaml").read_text()) == ("mine", "new")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["trainer_state.json", "selector", "checkpoint-9", ".hidden"])
def test_a_run_does_not_write_through_links(job: Callable[..., Path], tmp_path: Path, name: str) -> None:
    target = tmp_path / "precious"
    target.write_text("mine")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).symlink_to(target)
    with pytest.raises(InputError, match="this is a link") as caught:
        job("run", resume_from_checkpoint="auto")
    assert caught.value.place == "output_dir"
    assert target.read_text() == "mine"
