"""Model cards and `dro-rl push`: what they say of a run, and that nothing goes to a hub unless it is asked to."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import huggingface_hub
import pytest
import yaml
from huggingface_hub import ModelCard
from huggingface_hub.errors import HfHubHTTPError
from typer.testing import CliRunner

from dro_rl.cli import app
from dro_rl.errors import InputError
from dro_rl.evaluation.results import METRICS, Conditions, QuestionResult, write_results
from dro_rl.evaluation.stages import write_stages
from dro_rl.evaluation.statistics import estimate
from dro_rl.job.cards import recipe_text, write_cards

HOSTILE = "</td><script>x</script> | `a` ![i](http://x)\n---\n\u202e[l](http://y)"
SHA = "ab" * 32


def results(path: Path, hits: list[float], **conditions: Any) -> list[float]:
    """An evaluation of some questions, each right or wrong; returns what `em` is in percent."""
    rows = []
    for number, hit in enumerate(hits):
        scores = {name: float("nan") for name in METRICS} | {"em": hit, "f1": hit, "valid": 1.0, "answer_logp": -2.0}
        rows.append(QuestionResult(f"q{number}", "", "q?", ["a"], "a", -1.0, [1], scores))
    known = {"split": "dev", "num_questions": len(hits), "questions_hash": "q" * 64, "candidates_hash": "c" * 64}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_results(path, rows, Conditions(**{**known, "num_documents": 5, "num_selected": 2, **conditions}))
    return [100 * hit for hit in hits]


def run_in(folder: Path, *, roles: tuple[str, ...] = ("selector", "generator"), **recipe: Any) -> Path:
    """A run that has ended, with two questions more right than it began with."""
    folder.mkdir()
    for role in roles:
        (folder / role).mkdir()
        (folder / role / "config.json").write_text("{}")
        (folder / role / "model.safetensors").write_bytes(bytes(3 * 2**20))
        (folder / role / "prompt.jinja").write_text("{{ question }}")
    keys = {
        "output_dir": str(folder),
        "dataset_name": "/home/someone/data/birds",
        "num_iterations": 9,
        "selector_model_name_or_path": "/home/someone/models/base",
        "generator_model_name_or_path": "someone/base-1b",
        **recipe,
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(keys))
    inputs = {"dataset_name": {"questions": SHA}, "generator_model_name_or_path": {"commit": "c0ffee"}}
    ended = {"at": "2026-01-01T00:00:00+00:00", "kept": "iteration-6", "rates": {}, "signals": []}
    session = {"versions": {"dro_rl": "0.1.0", "torch": "2.13.0"}, "ended": ended}
    (folder / "run.json").write_text(json.dumps({"inputs": inputs, "sessions": [session]}))
    (folder / "trainer_state.json").write_text('{"log_history": []}')
    for stage, hits in (("base", [1, 0, 0, 0]), ("final", [1, 1, 1, 0])):
        results(folder / "evaluation" / f"{stage}.parquet", hits, stage=stage)
    write_stages(folder, [{"stage": stage, "split": "dev"} for stage in ("base", "iteration-6", "final")])
    return folder


def invoke(*arguments: object, **options: Any) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], **options)


# Cards ------------------------------------------------------------------------------------------------------


def test_a_card_says_base_results_with_intervals_hashes_and_recipe(tmp_path: Path) -> None:
    run = run_in(tmp_path / "run")
    test = results(run / "evaluation" / "test" / "questions.parquet", [1, 1, 0], stage="test", split="test",
                   questions_hash="t" * 64)  # fmt: skip
    results(run / "evaluation" / "test-random" / "questions.parquet", [0, 1, 0], stage="test", split="test",
            questions_hash="t" * 64, control="random")  # fmt: skip
    selector, generator = (path.read_text(encoding="utf-8") for path in write_cards(run))
    card = ModelCard(generator)
    assert card.data.base_model == "someone/base-1b"
    assert card.data.library_name == "transformers"
    assert set(card.data.tags) == {"dro-rl", "retrieval-augmented-generation", "generator"}
    assert ModelCard(selector).data.base_model is None
    assert "AutoModelForCausalLM" in generator
    for text in (selector, generator):
        assert "/home/someone" not in text
        assert "dataset_name: birds" in text
        assert "num_iterations: 9" in text
        assert f"| dataset\\_name | questions | {SHA} |".replace("\\_", "_") in text.replace("\\_", "_")
        for hits, who in (([100, 0, 0, 0], "before joint training"), ([100] * 3 + [0], "this pair (iteration-6)")):
            found = estimate(hits)
            (line,) = [line for line in text.splitlines() if line.startswith(f"| {who} |")]
            assert f"{found.mean:.2f}" in line
            assert f"{found.low:.2f} … {found.high:.2f}" in line
        (line,) = [line for line in text.splitlines() if line.startswith("| this pair |")]
        assert f"{estimate(test).mean:.2f}" in line
        assert "| control: random |" in text
        assert "On test: 3 questions" in text


def test_adapters_are_loaded_over_their_base(tmp_path: Path) -> None:
    run = run_in(tmp_path / "run")
    (run / "selector" / "config.json").rename(run / "selector" / "adapter_config.json")
    selector, generator = (ModelCard(path.read_text(encoding="utf-8")) for path in write_cards(run))
    assert selector.data.library_name == "peft"
    assert "AutoPeftModelForCausalLM" in selector.text
    assert "AutoPeftModelForCausalLM" not in generator.text


def test_a_model_that_was_frozen_is_not_called_trained(tmp_path: Path) -> None:
    run = run_in(tmp_path / "run", generator_learning_rate=0.0)
    selector, generator = (path.read_text(encoding="utf-8") for path in write_cards(run))
    assert "Trained from base" in selector
    assert "Kept as it was while the other moved: someone/base-1b" in generator


def test_texts_of_a_run_are_never_markup(tmp_path: Path) -> None:
    run = run_in(tmp_path / "run", run_name=HOSTILE, generator_model_name_or_path=HOSTILE, dataset_name=HOSTILE)
    results(
        run / "evaluation" / "x" / "questions.parquet", [1, 0], stage=HOSTILE, split=HOSTILE, questions_hash=HOSTILE
    )
    for path in write_cards(run):
        text = path.read_text(encoding="utf-8")
        body = ModelCard(text).text
        assert "\u202e" not in text
        outside = "\n".join(line for line in body.splitlines() if not line.startswith("    "))
        assert "<script>" not in outside
        assert "![i](" not in outside.replace("\\](", "")
        assert yaml.safe_load(text.split("---\n")[1])["pipeline_tag"] == "text-generation"
        recipe = [line for line in body.splitlines() if "run_name:" in line]
        assert len(recipe) == 1
        assert recipe[0].startswith("    ")


def test_the_recipe_in_a_card_says_what_was_changed_and_keeps_secrets_and_paths() -> None:
    said = yaml.safe_load(
        recipe_text({"num_iterations": 9, "hub_token": "hf_x", "output_dir": "/home/me/run", "seed": 42, "unknown": 1})
    )
    assert said["num_iterations"] == 9
    assert said["output_dir"] == "run"
    assert "hub_token" not in said
    assert "unknown" not in said


def test_the_command_writes_the_cards_anew(tmp_path: Path) -> None:
    run = run_in(tmp_path / "run", roles=("generator",))
    done = invoke("model", "card", run, "--json")
    assert json.loads(done.stdout) == {"cards": [str(run / "generator" / "README.md")]}
    assert "README.md" in invoke("model", "card", run).stdout
    results(run / "evaluation" / "late" / "questions.parquet", [1], stage="late", split="late", questions_hash="l" * 64)
    invoke("model", "card", run)
    assert "On late: 1 questions" in (run / "generator" / "README.md").read_text(encoding="utf-8")


def test_a_run_that_has_exported_nothing_has_no_card(tmp_path: Path) -> None:
    run = run_in(tmp_path / "run", roles=())
    with pytest.raises(InputError, match="no model was exported"):
        write_cards(run)
    done = invoke("model", "card", tmp_path)
    assert (done.exit_code, len(done.stderr.splitlines())) == (2, 1)


# Push -------------------------------------------------------------------------------------------------------


class FakeHub:
    """The client's calls, kept; and a hub that has what was created."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.private: dict[str, bool] = {}
        self.fails: Exception | None = None

    def create_repo(self, name: str, **options: Any) -> None:
        if self.fails is not None:
            raise self.fails
        self.calls.append(("create", {"name": name, **options}))
        self.private.setdefault(name, options["private"])

    def model_info(self, name: str) -> Any:
        return SimpleNamespace(private=self.private[name])

    def upload_folder(self, **options: Any) -> Any:
        self.calls.append(("upload", options))
        return SimpleNamespace(commit_url=f"https://hub/{options['repo_id']}/commit/1")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    fake = FakeHub()
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: fake)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_token")
    return fake


def test_a_push_lists_files_asks_and_sends_them_privately(hub: FakeHub, tmp_path: Path) -> None:
    run = run_in(tmp_path / "run")
    (run / "selector" / ".cache").write_text("x")
    (run / "selector" / "adapter").mkdir()
    (run / "selector" / "adapter" / "README.md").write_text("base_model: /home/someone/models/base")
    names = ("--repo-selector", "me/s", "--repo-generator", "me/g")
    refused = invoke("push", run, *names, input="n\n")
    assert (refused.exit_code, hub.calls) == (1, [])
    assert "3.00 MiB  model.safetensors" in refused.stdout
    done = invoke("push", run, *names, input="y\n")
    assert done.exit_code == 0, done.stderr
    assert [call for call, _ in hub.calls] == ["create", "upload"] * 2
    assert hub.private == {"me/s": True, "me/g": True}
    sent = hub.calls[1][1]
    assert (sent["repo_id"], sent["folder_path"]) == ("me/s", run / "selector")
    assert sent["allow_patterns"] == ["README.md", "config.json", "model.safetensors", "prompt.jinja"]
    assert "https://hub/me/g/commit/1" in done.stdout


def test_a_dry_run_needs_no_token_and_sends_nothing(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    run = run_in(tmp_path / "run")
    done = invoke("push", run, "--repo-selector", "me/s", "--dry-run", "--json")
    (plan,) = json.loads(done.stdout)["plans"]
    assert plan["files"]["model.safetensors"] == 3 * 2**20
    assert plan["files"].keys() == {"README.md", "config.json", "model.safetensors", "prompt.jinja"}
    assert hub.calls == []
    done = invoke("push", run, "--repo-selector", "me/s", "--yes")
    assert (done.exit_code, hub.calls) == (3, [])
    assert "no token" in done.stderr


def test_a_public_repository_takes_what_is_asked_to_be_public(hub: FakeHub, tmp_path: Path) -> None:
    run = run_in(tmp_path / "run")
    hub.private["me/s"] = False
    done = invoke("push", run, "--repo-selector", "me/s", "--yes")
    assert done.exit_code == 2
    assert "Add --public." in done.stderr
    assert [call for call, _ in hub.calls] == ["create"]
    assert invoke("push", run, "--repo-selector", "me/s", "--yes", "--public", "--json").exit_code == 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "Add --repo-selector or --repo-generator"),
        (("--repo-selector", "s"), "owner/name"),
        (("--repo-selector", "a b/c"), "--repo-selector"),
        (("--repo-selector", "me/x", "--repo-generator", "me/x"), "a repository of its own"),
        (("--repo-generator", "me/g"), "has exported this role"),
        (("--repo-selector", "me/s", "--json"), "Add --yes or --dry-run"),
    ],
)
def test_what_cannot_go_is_named_before_anything_goes(
    hub: FakeHub, tmp_path: Path, arguments: tuple[str, ...], said: str
) -> None:
    done = invoke("push", run_in(tmp_path / "run", roles=("selector",)), *arguments)
    assert (done.exit_code, hub.calls) == (2, [])
    assert said in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_hub_out_of_reach_is_a_lack_and_a_refusal_the_users(hub: FakeHub, tmp_path: Path) -> None:
    run = run_in(tmp_path / "run")
    hub.fails = httpx.ConnectError("no route")
    done = invoke("push", run, "--repo-selector", "me/s", "--yes")
    assert (done.exit_code, "cannot be reached" in done.stderr) == (3, True)
    answer = httpx.Response(403, request=httpx.Request("POST", "https://hub"))
    hub.fails = HfHubHTTPError("403 Forbidden: not yours", response=answer)
    done = invoke("push", run, "--repo-selector", "me/s", "--yes")
    assert (done.exit_code, "not yours" in done.stderr) == (2, True)
