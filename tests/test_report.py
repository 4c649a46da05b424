"""Claims about the report: one file that fetches nothing, says what runs say, and takes no text for markup."""

from __future__ import annotations

import html.parser
import json
import math
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any, get_args

import pytest
from test_cli_rollouts import DOCUMENTS, QUESTIONS, rollouts, write
from typer.testing import CliRunner

from dro_rl.cli import app
from dro_rl.evaluation.stages import SHOWN, write_stages
from dro_rl.report.curves import PANELS
from dro_rl.report.gather import names_of, tell, what_differs
from dro_rl.report.page import KIND_WORDS, write_report
from dro_rl.report.rollouts import _pick, _spread
from dro_rl.rollouts.diagnostics import KINDS
from dro_rl.rollouts.find import CHANGES, Only

HOSTILE = (
    "</script><script>document.title='stolen'</script><img src=x onerror=\"document.title='stolen'\">\u202e\x1b[31m"
)
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
RECIPE = (
    "dataset_name: {data}\nselector_model_name_or_path: a\ngenerator_model_name_or_path: b\noutput_dir: x\n"
    "num_selected: 2\n"
)


def stage(name: str, f1: float) -> dict[str, Any]:
    figures = {"em": f1 - 1, "f1": f1, "recall@1": 10.0, "answer_logp": -1.0, "valid": 100.0}
    return {"stage": name, "split": "dev", "n": 10, **figures}


def run_in(folder: Path, *, data: str = "nowhere", more: str = "", iterations: int = 2) -> Path:
    """A run that has ended: rollouts, two evaluations, a log."""
    for iteration in range(1, iterations + 1):
        groups = [
            rollouts(0, [[1, 3], [1, 2], [2, 1], []], [-1.0, -2.0, -3.0, math.nan], [0.6, 0.3, 0.1, 0.0]),
            rollouts(1, [[2, 1]] * 4, [-1.0 - iteration] * 4, [0.25] * 4),
        ]
        write(folder, iteration, 0, iteration - 1, 0, groups)
    (folder / "recipe.yaml").write_text(RECIPE.format(data=data) + more)
    write_stages(
        folder, [stage("base", 5.0), stage("iteration-1", 40.0), stage("iteration-2", 30.0), stage("final", 40.0)]
    )
    logged: list[dict[str, Any]] = [{"step": step, "eval_f1": 1.0, "eval_n": 10} for step in (0, 1, 2)]
    logged += [
        {"step": step, "loss": 1.0, "selector/loss": 0.5, "time/selector": 3.0, "time/rollout": 1.0} for step in (1, 2)
    ]
    (folder / "trainer_state.json").write_text(json.dumps({"log_history": logged}))
    return folder


class _Page(html.parser.HTMLParser):
    """Names of elements, addresses that a browser would fetch, and the text of the body."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.names: list[str] = []
        self.fetched: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.append(tag)
        for name, value in attrs:
            inside = value is not None and value.startswith("#")
            if name in ("src", "href", "xlink:href", "action", "data", "poster") and not inside:
                self.fetched.append(f"{tag} {name}={value}")

    def handle_data(self, data: str) -> None:
        self.text += data


def page_of(folder: Path, *runs: Path, **options: Any) -> _Page:
    output = folder / "report.html"
    assert write_report(runs, output, **options) == output.stat().st_size
    return _Page(output.read_text(encoding="utf-8"))


def data_of(folder: Path) -> dict[str, Any]:
    text = (folder / "report.html").read_text(encoding="utf-8")
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)[1])  # type: ignore[index]


def test_one_file_fetches_nothing(tmp_path: Path) -> None:
    page = page_of(tmp_path, run_in(tmp_path / "run"))
    assert page.fetched == []
    assert page.names.count("script") == 2
    assert not {"link", "iframe", "object", "embed", "img"} & set(page.names)
    assert "default-src 'none'" in (tmp_path / "report.html").read_text()
    assert "@import" not in (tmp_path / "report.html").read_text()


def test_it_says_what_the_run_says(tmp_path: Path) -> None:
    page = page_of(tmp_path, run_in(tmp_path / "run"))
    text = " ".join(page.text.split())
    assert "iteration-1 is kept; base had 5.00" in text
    assert "f1 40.00" in text
    assert "iteration 2 of 5, 16 rollouts" in text
    for title in (
        "F1 on dev",
        "Evidence",
        "Effective sample size",
        "Well-formed and valid",
        "Duplicates",
        "Time by phase",
    ):
        assert title in text
    assert "Engine mismatch" not in text  # nothing of it was logged
    assert "4 of 4 questions sampled." in text
    assert "documents without their texts (dataset_name: 'nowhere': it is on this machine" in text


def test_the_kept_stage_is_marked_once_in_the_table(tmp_path: Path) -> None:
    page_of(tmp_path, run_in(tmp_path / "run"))
    rows = re.findall(r'<tr class="kept"><th>([\w-]+)', (tmp_path / "report.html").read_text())
    assert rows == ["iteration-1"]


def test_what_differs_between_runs_and_nothing_else(tmp_path: Path) -> None:
    folders = [run_in(tmp_path / "a"), run_in(tmp_path / "b", more="num_generations: 4\nbeta: 0.0\n")]
    assert what_differs(tell(folders)) == [("num_generations", [8, 4])]
    text = page_of(tmp_path, *folders).text
    assert "What differs" in text
    assert text.count("num_generations") >= 3


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (("x/a", "x/b"), ["a", "b"]),
        (("x/run", "y/run"), ["x/run", "y/run"]),
        (("one",), ["one"]),
    ],
)
def test_runs_are_called_by_what_tells_them_apart(paths: tuple[str, ...], names: list[str], tmp_path: Path) -> None:
    assert names_of([tmp_path / path for path in paths]) == names


def test_figures_are_those_of_the_log(tmp_path: Path) -> None:
    (told,) = tell([run_in(tmp_path / "run")])
    assert [point.value for point in told.curves["dev f1"]] == [5.0, 40.0, 30.0]
    assert [point.x for point in told.curves["evidence_bound"]] == [0, 1]
    assert told.curves["clean"][0].value == 7 / 8
    assert "recall@3" not in told.curves  # two documents are selected
    assert dict(told.phases) == {"selector": 6.0, "rollout": 2.0}
    assert all(0 <= point.low <= point.value <= point.high <= 1 for point in told.curves["valid"])  # type: ignore[operator]


def test_documents_stand_beside_each_other_with_their_texts(tmp_path: Path) -> None:
    from dataclasses import asdict

    lines = (
        json.dumps({key: value for key, value in asdict(question).items() if key != "type"}) for question in QUESTIONS
    )
    (tmp_path / "train.jsonl").write_text("\n".join(lines))
    page_of(tmp_path, run_in(tmp_path / "run", data=str(tmp_path / "train.jsonl")))
    group = next(group for group in data_of(tmp_path)["groups"] if group["id"] == "a")
    assert group["documents"]["1"] == {"title": DOCUMENTS[0].title, "text": "A composer.", "gold": True}
    assert group["documents"]["2"]["text"] == "A passage without a title."
    assert [rollout["z"] for rollout in group["rollouts"]] == [[1, 3], [1, 2], [2, 1], []]
    assert group["rollouts"][3]["x"] == ["format", "too_few"]


def test_kinds_are_those_of_the_commands(tmp_path: Path) -> None:
    """Nobody selected gold of `b`, which has none: it was not missed."""
    page_of(tmp_path, run_in(tmp_path / "run"))
    kinds = {group["id"]: group["kinds"] for group in data_of(tmp_path)["groups"]}
    assert kinds == {"a": ["invalid"], "b": ["tie", "collapsed"]}
    assert tuple(KIND_WORDS) == KINDS
    assert {*KINDS, *CHANGES} == set(get_args(Only))
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert re.findall(r'<option value="(\w+)">', text)[:6] == [*KINDS, "problems"]


def test_intervals_are_of_the_metrics_that_are_shown_and_of_the_one_that_decides(tmp_path: Path) -> None:
    (told,) = tell([run_in(tmp_path / "run", more="metric_for_best_model: answer_recall@5\n")])
    assert set(told.stages["base"]) <= {*SHOWN, "answer_recall@5"}
    drawn = {name for panel in PANELS for name in panel.curves}
    assert {name for name in told.curves if not name.startswith("dev ")} <= drawn


def test_of_many_questions_some_are_shown_by_a_stated_rule(tmp_path: Path) -> None:
    page = page_of(tmp_path, run_in(tmp_path / "run", iterations=20), questions=12)
    groups = data_of(tmp_path)["groups"]
    assert len(groups) == 12
    assert [groups[0]["iteration"], groups[-1]["iteration"]] == [1, 20]
    assert "12 of 40 questions sampled. Of each run at most 12 iterations" in " ".join(page.text.split())


def test_the_rule_takes_both_ends_and_equal_distances() -> None:
    assert _spread(range(100), 4) == [0, 33, 66, 99]
    assert _spread([5, 6], 4) == [5, 6]
    assert _pick(range(100), 8) == [0, 1, 2, 34, 65, 97, 98, 99]
    assert _pick(range(3), 8) == [0, 1, 2]


def hostile_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Texts that would be markup, or steer what shows them, in every place that data can reach."""
    from dataclasses import replace

    import test_cli_rollouts

    bad = tuple(replace(document, title=f"T{HOSTILE}") for document in DOCUMENTS)
    asked = tuple(
        replace(question, question=f"Q{HOSTILE}", answers=(f"A{HOSTILE}",), documents=bad) for question in QUESTIONS
    )
    monkeypatch.setattr(test_cli_rollouts, "QUESTIONS", asked)
    return run_in(folder, more=f"run_name: {json.dumps(HOSTILE)}\n")


def test_texts_from_data_are_never_markup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = hostile_run(tmp_path / "<b>run</b> & co", monkeypatch)
    page = page_of(tmp_path, run)
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert page.names.count("script") == 2
    assert "img" not in page.names
    assert page.names.count("b") == text.count("<b>")
    assert "<b>run</b>" not in text
    assert not re.search("[\x00-\x08\x0b-\x1f\u202a-\u202e]", text)
    group = data_of(tmp_path)["groups"][0]
    assert group["question"].startswith("Q</script>")
    assert "\\x1b[31m" in group["question"]
    assert "\\u202e" in group["documents"]["1"]["title"]


def in_browser(page: Path, script: str) -> str:
    """What a script in the page leaves in the title, in a real browser."""
    text = page.read_text(encoding="utf-8").replace("</body>", f"<script>{script}</script></body>")
    page.with_name("driven.html").write_text(text, encoding="utf-8")
    command = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=4000", "--dump-dom"]
    done = subprocess.run(
        [*command, page.with_name("driven.html").as_uri()], capture_output=True, text=True, timeout=300
    )
    return re.search("<title>(.*?)</title>", done.stdout, re.DOTALL)[1]  # type: ignore[index]


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no browser here")
def test_a_real_browser_searches_filters_and_opens_and_runs_nothing_of_the_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_report([hostile_run(tmp_path / "run", monkeypatch)], tmp_path / "report.html")
    script = """
    const put = (id, value) => {
      document.getElementById(id).value = value;
      document.getElementById(id).dispatchEvent(new Event("input", {bubbles: true}));
    };
    const count = () => document.getElementById("count").textContent;
    const said = [count()];
    put("search", "no-such-word"); said.push(count());
    put("search", ""); put("kind", "problems"); said.push(count());
    put("iteration", "2"); said.push(count());
    const first = document.querySelector(".question"); first.open = true;
    setTimeout(() => {
      said.push(first.querySelectorAll("tbody tr").length, first.querySelectorAll(".document").length);
      said.push(document.querySelectorAll("img").length, document.documentElement.scrollWidth <= window.innerWidth);
      document.title = (document.title.includes("stolen") ? "stolen " : "") + said.join("; ");
    }, 500);
    """
    assert in_browser(tmp_path / "report.html", script) == (
        "4 of 4 questions; 0 of 4 questions; 2 of 4 questions; 1 of 4 questions; 4; 3; 0; true"
    )


@pytest.mark.parametrize(
    ("arguments", "said"),
    [((), "RUN"), (("nowhere",), "nowhere"), (("run", "run"), "once"), (("run", "--study", "nonsense"), "nonsense")],
)
def test_what_cannot_be_told_is_a_line(
    arguments: tuple[str, ...], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_in(tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, ["report", *arguments, "-o", "r.html"])
    assert done.exit_code == 2, done.output
    assert said in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "r.html").exists()


def test_a_run_that_has_only_begun_has_a_page(tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "rollouts").mkdir(parents=True)
    (run / "recipe.yaml").write_text(RECIPE.format(data="nowhere"))
    text = page_of(tmp_path, run).text
    assert "iteration 0 of 5" in text
    done = CliRunner().invoke(app, ["report", str(run), "-o", str(tmp_path / "r.html"), "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["bytes"] == (tmp_path / "r.html").stat().st_size
