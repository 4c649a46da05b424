"""What colbert-ai needs to run here: repairs of one version of it, and its compiled extensions, checked beforehand.

Nothing of the package on disk is changed. Each repair says what it is for and goes when the version does.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import logging
import multiprocessing
import os
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import wraps
from pathlib import Path
from typing import Any

from dro_rl.errors import InputError, LackError, Phrase

logger = logging.getLogger(__name__)

REPAIRED = "0.2.22"
"""The version of colbert-ai that the repairs are of."""

EXTENSIONS = {
    "segmented_maxsim_cpp": "modeling/segmented_maxsim.cpp",
    "segmented_lookup_cpp": "search/segmented_lookup.cpp",
    "filter_pids_cpp": "search/filter_pids.cpp",
    "decompress_residuals_cpp": "search/decompress_residuals.cpp",
}
"""What colbert-ai compiles for a CPU at first use, by name. With a GPU it compiles others itself."""

LOCK_PATIENCE = 900.0
"""Seconds for which a lock is believed although nothing changes beside it. A busy machine compiles for minutes."""


def check_runtime() -> None:
    """Raise `InputError` where the package, faiss or a compiler is missing, or the version is another one."""
    for module in ("colbert", "faiss", "ninja"):
        if importlib.util.find_spec(module) is None:
            raise LackError(
                "colbert",
                Phrase(f"{module} is not installed"),
                "ColBERT runs on colbert-ai and faiss",
                "pip install 'dro_rl[colbert]'",
            )
    version = importlib.metadata.version("colbert-ai")
    if version != REPAIRED:
        raise InputError(
            "colbert", version, f"dro_rl knows colbert-ai {REPAIRED}", f"pip install colbert-ai=={REPAIRED}"
        )
    if shutil.which("ninja") is None:  # torch looks on the path, where an environment that is not activated is not
        import ninja

        os.environ["PATH"] = f"{ninja.BIN_DIR}{os.pathsep}{os.environ.get('PATH', '')}"
    import torch

    compilers = [os.environ.get("CXX", "c++")] + (["nvcc"] if torch.cuda.is_available() else [])
    for compiler in compilers:
        if shutil.which(compiler) is None and not _in_cuda_home(compiler):
            raise InputError(
                "colbert",
                Phrase(f"no {compiler} on the path"),
                "colbert-ai compiles C++ extensions at its first use",
                "Install it (g++; the CUDA toolkit for nvcc), or name a compiler in CXX.",
            )


def load_colbert() -> None:
    """Import colbert-ai, repaired, its extensions compiled. Call `check_runtime` before.

    Raises:
        InputError: an extension does not compile, or is locked by a process that is gone.
    """
    os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")  # it imports GitPython, which wants the git program
    method = multiprocessing.get_start_method(allow_none=True)
    import colbert

    multiprocessing.set_start_method(method, force=True)  # its import sets the whole program to spawn
    _repair()
    import torch

    if not torch.cuda.is_available():
        _compile(Path(colbert.__file__).parent)


def _repair() -> None:
    from colbert.indexing import collection_indexer
    from colbert.modeling import base_colbert, hf_colbert

    if base_colbert.class_factory is hf_colbert.class_factory:
        base_colbert.class_factory = _repaired_classes(hf_colbert.class_factory)
    collection_indexer.compute_faiss_kmeans = _kmeans


def _repaired_classes(factory: Callable[[str], type]) -> Callable[[str], type]:
    """Its model class was written for transformers 4: in 5, these keys are a set, and tied weights are looked up."""

    @wraps(factory)
    def repaired(name: str) -> type:
        cls: Any = factory(name)
        cls._keys_to_ignore_on_load_unexpected = set(cls._keys_to_ignore_on_load_unexpected)
        cls.all_tied_weights_keys = {}
        return cls

    return repaired


def _kmeans(dim: int, num_partitions: int, kmeans_niters: int, shared_lists: Any) -> Any:
    """Its own asks faiss for a GPU wherever torch has one, and faiss as it installs has none."""
    import faiss
    import torch

    gpu = torch.cuda.is_available() and getattr(faiss, "get_num_gpus", int)() > 0
    kmeans = faiss.Kmeans(dim, num_partitions, niter=kmeans_niters, gpu=gpu, seed=123)
    kmeans.train(shared_lists[0][0].float().numpy())
    return torch.from_numpy(kmeans.centroids)


def _compile(package: Path) -> None:
    """Compile the extensions side by side, each once for all; colbert-ai then finds them as it would have made them."""
    from torch.utils import cpp_extension

    missing = [name for name in EXTENSIONS if not (build_folder(name) / f"{name}.so").is_file()]
    if missing:
        logger.info("compiling %d C++ extensions of colbert-ai, once: minutes", len(missing))

    def compile_one(name: str) -> None:
        wait_for_lock(name)
        source = str(package.resolve() / EXTENSIONS[name])
        try:
            cpp_extension.load(name=name, sources=[source], extra_cflags=["-O3"])
        except (RuntimeError, OSError, ImportError) as error:
            raise InputError(
                f"colbert: {name}",
                Phrase(str(error).strip().splitlines()[-1][:200]),
                "the extensions of colbert-ai compile",
                f"Mend the compiler; what it said is above. Then delete {build_folder(name)}.",
            ) from None

    with ThreadPoolExecutor(min(len(EXTENSIONS), os.cpu_count() or 1)) as pool:
        list(pool.map(compile_one, EXTENSIONS))


def build_folder(name: str) -> Path:
    """Where torch compiles an extension of this name."""
    from torch.utils import cpp_extension

    return Path(cpp_extension._get_build_directory(name, verbose=False))


def wait_for_lock(name: str, patience: float | None = None) -> None:
    """Wait while another process compiles an extension; raise `InputError` when it seems to be gone.

    torch waits for ever for a lock file that a killed process left. A compile writes files; a lock beside which
    nothing has changed for `patience` seconds is not of one.
    """
    patience = LOCK_PATIENCE if patience is None else patience
    folder = build_folder(name)
    lock = folder / "lock"
    while lock.exists():
        times = [path.stat().st_mtime for path in folder.iterdir() if path.exists()]
        if time.time() - max(times, default=0.0) > patience:
            raise InputError(
                str(lock),
                Phrase(f"a lock beside which nothing has changed for {patience:.0f} s"),
                "a process that compiles holds its lock, and a killed one leaves it behind",
                "Delete the file if no other process compiles.",
            )
        time.sleep(0.5)


def _in_cuda_home(program: str) -> bool:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    return program == "nvcc" and (Path(home) / "bin" / program).is_file()
