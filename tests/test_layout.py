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
EXTRAS = ("duckdb", "vllm", "colbert", "peft", "wandb", "trackio", "mlflow", "deepspeed")


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


def test_data_flows_one_way() -> None:
    """Nothing in these modules knows of trainers, engines or the command line."""
    later = {
        "trainer",
        "train",
        "cli",
        "rollouts",
        "recipe",
        "config",
        "pipeline",
        "evaluation",
        "warmup",
        "models",
    }
    for name in ("objective", "likelihood/__init__", "selection/__init__", "records"):
        tree = ast.parse((PACKAGE / f"{name}.py").read_text(encoding="utf-8"))
        modules = [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
        ours = {module.split(".")[1] for module in modules if module.startswith("dro_rl.")}
        assert not ours & later, name


def test_the_trainer_stays_readable() -> None:
    assert len((PACKAGE / "trainer.py").read_text(encoding="utf-8").splitlines()) < 900


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
        "trl.trainer.base_config": {"_BaseConfig"},
        "trl.trainer.base_trainer": {"_BaseTrainer"},
    }
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
