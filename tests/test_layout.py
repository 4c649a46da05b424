"""Claims about the package as a whole: names, imports, size, and what it leans on in TRL and transformers."""

from __future__ import annotations

import ast
import importlib.metadata
import inspect
import subprocess
import sys
from pathlib import Path

import pytest
import transformers
import trl
from trl.trainer.base_config import _BaseConfig
from trl.trainer.base_trainer import _BaseTrainer

import dro_rl
from dro_rl.trainer import DROTrainer

PACKAGE = Path(dro_rl.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
EXTRAS = (
    "bitsandbytes", "duckdb", "vllm", "colbert", "faiss", "sentence_transformers", "peft", "wandb", "trackio", "mlflow",
    "deepspeed", "fastapi", "starlette", "uvicorn", "prometheus_client",
)  # fmt: skip


def run_python(source: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-W", "ignore", "-c", source], capture_output=True, text=True, timeout=120)


# Names ------------------------------------------------------------------------------------------------------


def test_no_module_of_ours_hides_another() -> None:
    """`accelerate launch dro_rl/train.py` puts the folder first on the path: ahead of every package."""
    names = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or path.is_dir()}
    names -= {"__init__", "__pycache__"}
    ours = {"dro_rl", "dro-rl"}
    installed = {
        name for name, owners in importlib.metadata.packages_distributions().items() if not ours.issuperset(owners)
    }
    assert len(names) > 10
    assert not names & (installed | set(sys.stdlib_module_names))


# Imports ----------------------------------------------------------------------------------------------------


WITHOUT_EXTRAS = f"""
import importlib, importlib.machinery, pkgutil, socket
blocked = {EXTRAS}
found = importlib.machinery.PathFinder.find_spec
def find_spec(name, path=None, target=None):
    return None if name.split(".")[0] in blocked else found(name, path, target)
importlib.machinery.PathFinder.find_spec = staticmethod(find_spec)
def refuse(*_):
    raise AssertionError("network")
socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = refuse
import dro_rl
names = [module.name for module in pkgutil.walk_packages(dro_rl.__path__, "dro_rl.")]
for name in names:
    importlib.import_module(name)
import sys
assert not set(blocked) & set(sys.modules)
print(len(names))
"""


def test_every_module_imports_without_extras_and_without_network() -> None:
    done = run_python(WITHOUT_EXTRAS)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) > 30


def test_extras_are_imported_within_functions_alone() -> None:
    """Their absence is an error that names the extra, where it is needed."""
    for path in FILES:
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not [name for name in names if name.split(".")[0] in EXTRAS], path


def test_the_objective_needs_torch_alone() -> None:
    done = run_python(
        "import sys, dro_rl.objective; assert 'torch' in sys.modules;"
        "print([name for name in sys.modules if '.' not in name])"
    )
    assert done.returncode == 0, done.stderr
    for name in ("transformers", "trl", "accelerate", "datasets"):
        assert f"'{name}'" not in done.stdout


LAYERS = (
    ("shown", "files", "roles", "proposal", "objective", "hub", "progress"),
    ("errors", "terminal"),
    ("rows", "flat_yaml", "shipped", "processes", "likelihood"),
    ("records", "locks", "models"),
    ("selection", "metrics"),
    ("prompts", "rewards", "rollouts", "toy"),
    ("data", "keys"),
    ("config", "retrieval"),
    ("recipe",),
    ("engines",),
    ("pipeline",),
    ("evaluation", "serve"),
    ("runs",),
    ("em",),
    ("trainer",),
    ("job",),
    ("study", "resources", "doctor"),
    ("report",),
    ("train", "cli"),
    ("__main__",),
)
"""The rooms, the lowest first. A room imports rooms of lower layers, nowhere else; docs/architecture.md draws it."""
PURE = ("objective", "likelihood", "selection", "metrics", "proposal", "prompts", "rewards", "rollouts",
        "em/weighing", "em/e_step", "em/m_step", "study/verdicts")  # fmt: skip
"""They take values, and know no settings."""


def imports_of(path: Path, *, checked_alone: bool) -> set[str]:
    """Modules of ours that a file imports, anywhere in it; those for the type checker alone, if asked."""
    found: set[str] = set()

    def walk(node: ast.AST) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING" and not checked_alone:
                continue
            if isinstance(child, ast.ImportFrom) and child.module == "dro_rl":
                found.update(f"dro_rl.{alias.name}" for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, f"{path}: imports are absolute"
                found.add(child.module or "")
            elif isinstance(child, ast.Import):
                found.update(alias.name for alias in child.names)
            walk(child)

    walk(ast.parse(path.read_text(encoding="utf-8")))
    return {name for name in found if name.startswith("dro_rl.")}


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", [path for path in FILES if path.parent != PACKAGE or path.stem != "__init__"],
                         ids=lambda path: str(path.relative_to(PACKAGE)))  # fmt: skip
def test_imports_go_down(path: Path) -> None:
    """The one table of layers: a new room has a place in it, and no module imports a room beside or above its own."""
    layer = {room: number for number, rooms in enumerate(LAYERS) for room in rooms}
    own = room_of(path)
    assert own in layer, "give the new room a layer"
    for name in imports_of(path, checked_alone=False):
        other = name.split(".")[1]
        if other in layer and other != own:  # else a name of the package itself
            assert layer[other] < layer[own], f"{own} imports {other}"


def test_every_layer_has_rooms_that_there_are() -> None:
    rooms = {room_of(path) for path in FILES} - {"__init__"}
    assert {room for layer in LAYERS for room in layer} == rooms
    assert sum(map(len, LAYERS)) == len(rooms)


@pytest.mark.parametrize("room", PURE)
def test_pure_rooms_know_no_settings(room: str) -> None:
    place = PACKAGE / room
    for path in sorted(place.rglob("*.py")) if place.is_dir() else [place.with_suffix(".py")]:
        assert not {name.split(".")[1] for name in imports_of(path, checked_alone=True)} & {"config", "recipe", "keys"}


def test_the_trainer_stays_readable() -> None:
    assert len((PACKAGE / "trainer.py").read_text(encoding="utf-8").splitlines()) < 600


# What we lean on --------------------------------------------------------------------------------------------


def trl_names() -> dict[str, set[str]]:
    """Every TRL name that the package uses, by module: imported, or read off `trl` itself."""
    found: dict[str, set[str]] = {}
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "trl":
                found.setdefault(node.module or "", set()).update(alias.name for alias in node.names)
            elif isinstance(node, ast.Import):
                for alias in node.names:
                    assert alias.name.split(".")[0] != "trl" or (alias.name, alias.asname) == ("trl", None)
            elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "trl":
                found.setdefault("trl", set()).add(node.attr)
    return found


def keywords_given_to(name: str) -> set[str]:
    """Keywords with which the package calls `trl.<name>`."""
    return {
        keyword.arg
        for path in FILES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == name
        for keyword in node.keywords
        if keyword.arg
    }


def test_these_are_the_trl_names_that_we_use() -> None:
    """TRL is pinned to one minor version. Add a name only with the signature it relies on."""
    assert trl_names() == {
        "trl": {"SFTConfig", "SFTTrainer", "__version__"},
        "trl.generation": {"vllm_generation"},
        "trl.models": {"get_act_offloading_ctx_manager"},
        "trl.trainer": {"utils"},  # for `_use_triton` alone
        "trl.trainer.base_config": {"_BaseConfig"},
        "trl.trainer.base_trainer": {"_BaseTrainer"},
    }
    assert list(inspect.signature(trl.trainer.utils._use_triton).parameters) == ["device"]
    assert issubclass(_BaseConfig, transformers.TrainingArguments)
    assert issubclass(_BaseTrainer, transformers.Trainer)
    for hook in ("_send_telemetry", "loss_is_scaled_for_ga", "_tag_names", "_name", "_paper"):
        assert hook in vars(_BaseTrainer)
    assert keywords_given_to("SFTConfig") <= set(inspect.signature(trl.SFTConfig).parameters)
    assert keywords_given_to("SFTTrainer") <= set(inspect.signature(trl.SFTTrainer).parameters)
    assert keywords_given_to("SFTTrainer") >= {"model", "args", "train_dataset", "processing_class"}


def test_this_is_what_we_use_of_trls_vllm() -> None:
    pytest.importorskip("vllm", reason="vLLM is not installed: make setup-vllm")
    from trl.generation import vllm_generation

    engine = vllm_generation.VLLMGeneration
    given = keywords_given_to("VLLMGeneration")
    assert {"model", "accelerator", "processing_class", "mode", "server_base_url", "enable_sleep_mode"} <= given
    assert given <= set(inspect.signature(engine).parameters)
    assert list(inspect.signature(engine.sync_weights).parameters) == ["self"]
    assert list(inspect.signature(engine._iter_named_params).parameters) == ["self"]
    assert "LLM" in vars(vllm_generation)  # what `vllm_colocate` stands in for


def test_these_are_the_trainer_methods_that_we_replace() -> None:
    """A method that is renamed upstream would be called no more, silently."""
    ours = {name for name in vars(DROTrainer) if inspect.isfunction(vars(DROTrainer)[name])}
    replaced = {name for name in ours if hasattr(_BaseTrainer, name)}
    assert replaced == {
        "__init__", "_send_telemetry", "_get_train_sampler", "_prepare_inputs", "compute_loss",
        "training_step", "create_optimizer", "_clip_grad_norm", "evaluate", "log", "train",
        "_save_checkpoint", "save_model",
        "_load_from_checkpoint", "_load_best_model", "_load_optimizer_and_scheduler", "create_scheduler",
        "_determine_best_metric",
    }  # fmt: skip
    assert {
        name: tuple(inspect.signature(getattr(_BaseTrainer, name)).parameters)[1:]
        for name in (
            "compute_loss",
            "training_step",
            "_save_checkpoint",
            "save_model",
            "log",
            "_clip_grad_norm",
        )
    } == {
        "compute_loss": ("model", "inputs", "return_outputs", "num_items_in_batch"),
        "training_step": ("model", "inputs", "num_items_in_batch"),
        "_save_checkpoint": ("model", "trial"),
        "save_model": ("output_dir", "_internal_call"),
        "log": ("logs", "start_time"),
        "_clip_grad_norm": ("model",),
    }


def test_what_we_call_of_the_trainer_is_there() -> None:
    for name in (
        "_save_optimizer_and_scheduler",
        "_save_scaler",
        "_save_rng_state",
        "get_decay_parameter_names",
    ):
        assert callable(getattr(_BaseTrainer, name))


def test_nothing_is_reported_to_anyone() -> None:
    """Neither TRL's telemetry, nor the hub client's unless it is asked for."""
    assert "_send_telemetry" in vars(DROTrainer)
    done = run_python(
        "import os; key = 'HF_HUB_DISABLE_TELEMETRY'; os.environ.pop(key, 0);import dro_rl; print(os.environ[key])"
    )
    assert done.stdout.strip() == "1"
