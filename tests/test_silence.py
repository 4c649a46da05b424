"""Claims about the network: whichever way a command is started, nothing leaves the process.

Every client is pointed at a listener on loopback, as the hub and as the proxy for everything else. `python` alone is
what `accelerate launch` and `dro-rl train` come to.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from training_world import ROOT, questions, world

import dro_rl


class Listener:
    """Takes connections and keeps what was said first; answers nothing."""

    def __init__(self) -> None:
        self.heard: list[bytes] = []
        self._server = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._server.getsockname()[1]}"
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        while True:
            try:
                connection, _ = self._server.accept()
            except OSError:
                return
            with connection:
                connection.settimeout(5)
                self.heard.append(connection.recv(200))

    def close(self) -> None:
        self._server.close()


@pytest.fixture
def listener() -> Iterator[Listener]:
    made = Listener()
    yield made
    made.close()


def environment(listener: Listener, home: Path) -> dict[str, str]:
    """That of a user who has set nothing, with the listener in the place of everyone."""
    unset = {*dro_rl.SILENT, "CI", "NO_PROXY", "no_proxy", "HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"}
    kept = {name: value for name, value in os.environ.items() if name not in unset}
    proxies = dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy"), listener.url)
    return {**kept, **proxies, "HF_ENDPOINT": listener.url, "VLLM_USAGE_STATS_SERVER": listener.url, "HOME": str(home)}


def run(listener: Listener, home: Path, *command: str | Path) -> None:
    done = subprocess.run(
        [sys.executable, *map(str, command)], env=environment(listener, home), cwd=home,
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_the_listener_hears_what_would_be_sent(listener: Listener, tmp_path: Path) -> None:
    """Else the claims below would hold for anything: with the switch turned back, TRL's own report is heard."""
    report = "from huggingface_hub.utils import _telemetry; _telemetry._send_telemetry_in_thread('trl/SFTTrainer')"
    run(listener, tmp_path, "-c", report)
    assert any(said.startswith(b"HEAD ") and b"/api/telemetry/trl/SFTTrainer" in said for said in listener.heard)


TRAIN = {
    "dro-rl train": ["-c", "from dro_rl.cli import app; app()", "train"],
    "accelerate launch dro_rl/train.py": ["-m", "accelerate.commands.launch", ROOT / "dro_rl" / "train.py"],
}


@pytest.mark.slow
@pytest.mark.parametrize("way", TRAIN)
def test_a_training_with_a_warm_up_is_silent_however_it_is_started(
    listener: Listener, tmp_path: Path, way: str
) -> None:
    """Defect: transformers was imported before the switch was set, and the warm-up sent two reports."""
    recipe = world(tmp_path, warmup="both", warmup_selector_order="random", num_iterations=1)
    run(listener, tmp_path, *TRAIN[way], recipe)
    assert listener.heard == []


IN_TURN = """
import sys, json
from dro_rl.cli import app
for command in json.loads(sys.argv[1]):
    app(command, standalone_mode=False)
"""


@pytest.mark.slow
def test_the_other_commands_are_silent(listener: Listener, tmp_path: Path) -> None:
    """On a run that was trained beside transformers imported first, as a program of one's own would."""
    recipe = world(tmp_path, warmup="both", warmup_selector_order="random", num_iterations=1)
    dev, run_dir = tmp_path / "dev.jsonl", tmp_path / "run"
    corpus = tmp_path / "corpus.jsonl"
    rows = {document.id: document for question in questions(4) for document in question.documents}
    corpus.write_text("".join(json.dumps({"id": d.id, "title": d.title, "text": d.text}) + "\n" for d in rows.values()))
    train = f"import transformers, datasets\nfrom dro_rl.train import main\nmain([{str(recipe)!r}])"
    run(listener, tmp_path, "-c", train)
    commands = [
        ["recipe", "ls"],
        ["recipe", "validate", recipe],
        ["data", "check", dev],
        ["data", "show", dev],
        ["index", "bm25", corpus, tmp_path / "index"],
        ["retrieve", tmp_path / "index", dev, "--k", "3", "--output", tmp_path / "found.jsonl"],
        ["retrieval", "report", tmp_path / "found.jsonl"],
        ["rollouts", "ls", run_dir],
        ["rollouts", "show", run_dir],
        ["rollouts", "stats", run_dir],
        ["evaluate", run_dir, "--data", dev],
        ["evaluate", run_dir, "--data", dev, "--control", "retriever-order"],
        ["ask", run_dir, "where lives ada ?", "--documents", corpus],
    ]
    run(listener, tmp_path, "-c", IN_TURN, json.dumps([[str(word) for word in command] for command in commands]))
    assert listener.heard == []


def test_a_switch_that_someone_set_is_left_as_it_is(listener: Listener, tmp_path: Path) -> None:
    change, look = "os.environ['HF_HUB_DISABLE_TELEMETRY'] = '0'", "os.environ['HF_HUB_DISABLE_TELEMETRY'] == '0'"
    run(listener, tmp_path, "-c", f"import os; {change}; import dro_rl; assert {look}")
