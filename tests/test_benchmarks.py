"""Claims about the benchmarks: each runs from its command line and leaves a table and JSON of a known shape; what they
share does what it says. Figures are not tested: they belong to a machine."""

from __future__ import annotations

import importlib
import itertools
import json
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import typer
from torch import Tensor, nn
from typer.testing import CliRunner

from benchmarks import child, commands, gpu, harness, operations, rollout_log, world
from dro_rl.cli import app as dro_rl_app
from dro_rl.engines.decoding import Decoder
from dro_rl.engines.protocol import GenerationRequest
from dro_rl.prompts import Prompter
from dro_rl.proposal import SamplingParams
from dro_rl.selection import parse_selection

TINY = ["--model", "64x1"]
STEP = ["--documents", "8", "--m", "4", "--k", "3", "--tokens", "8", "--steps", "2"]


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cases run here: a process of its own takes seconds to import what it needs."""
    monkeypatch.setattr(harness, "apart", lambda function, **arguments: function(**arguments))
    monkeypatch.setattr(harness, "PeakMemory", _NoMemory)


class _NoMemory:
    """The peak of a test session says nothing."""

    def __init__(self, device: str) -> None: ...

    def mib(self) -> float:
        return 1.0

    total_mib = mib


def run(name: str, folder: Path, *options: str) -> dict[str, Any]:
    """The benchmark's JSON, after a look at its Markdown."""
    app = typer.Typer()
    app.command()(importlib.import_module(f"benchmarks.{name}").main)
    result = CliRunner().invoke(app, [*options, "--output", str(folder)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    written = json.loads((folder / f"{name}.json").read_text())
    table = (folder / f"{name}.md").read_text()
    assert table in result.output
    assert f"`{written['command']}`" in table
    assert written["command"].startswith(f"python -m benchmarks.{name} ")
    assert not {"None", "()", "[]"} & set(written["command"].split())
    assert {"machine", "gpu", "threads", "python", "torch", "transformers", "trl", "options", "notes"} <= written.keys()
    lines = [line for line in table.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in lines}) == 1
    return written


@pytest.mark.usefixtures("in_this_process")
def test_one_card_measures_one_base_against_two(tmp_path: Path) -> None:
    sizes = ["--held", "none", "--held", "nf4", "--m", "2", "--prompt", "40", "--read", "20", "--repeats", "1"]
    rows = run("one_card", tmp_path, *TINY, *sizes)["rows"]
    assert [(row["held"], row["shared"]) for row in rows] == [
        ("none", False), ("none", True), ("nf4", False), ("nf4", True),
    ]  # fmt: skip
    assert all(row["peak"] > 0 and len(row["seconds"]) == 1 for row in rows)


@pytest.mark.usefixtures("in_this_process")
def test_selector_update_measures_both_paths(tmp_path: Path) -> None:
    sizes = ["--m", "1", "--m", "3", "--plain-m", "3", "--prompt", "20", "--completion", "3", "--repeats", "2"]
    rows = run("selector_update", tmp_path, *TINY, *sizes)["rows"]
    assert [row["m"] for row in rows] == [1, 3]
    assert rows[0]["plain"] is None
    assert all(len(rows[1][path]["seconds"]) == 2 for path in ("plain", "packed"))
    assert rows[1]["fewer_tokens"] == 3 * 23 / (20 + 9)


@pytest.mark.usefixtures("in_this_process")
def test_sampling_pass_measures_prompts_read_once_and_twice(tmp_path: Path) -> None:
    sizes = ["--m", "1", "--m", "3", "--prompt", "20", "--completion", "4", "--questions", "2", "--repeats", "2"]
    for options, passes in (([], 4), (["--checkpointing"], 5)):
        rows = run("sampling_pass", tmp_path, *TINY, *sizes, *options)["rows"]
        assert [row["m"] for row in rows] == [1, 3]
        assert all(len(row[way]["seconds"]) == 2 for row in rows for way in ("twice", "once"))
        assert rows[1]["fewer_operations"] == passes * 32 / ((passes - 1) * 20 + passes * 12)


@pytest.mark.usefixtures("in_this_process")
def test_generator_update_measures_each_way_on_both_policies(tmp_path: Path) -> None:
    sizes = ["--m", "8", "--distinct", "4", "--documents", "20", "--k", "5", "--tokens", "40", "--repeats", "2"]
    rows = run("generator_update", tmp_path, *TINY, *sizes)["rows"]
    assert [(row["policy"], row["distinct"]) for row in rows] == [("fresh", 8)] * 4 + [("sharpened", 4)] * 4
    plain, fused, once, tree = (row["tokens"] for row in rows[4:])
    assert plain == 2 * fused  # of equal lengths, so nothing is padded: scored, then trained
    assert once * 2 == fused
    assert tree < once


@pytest.mark.slow
@pytest.mark.usefixtures("in_this_process")
def test_a_whole_step_is_measured_on_both_sides(tmp_path: Path) -> None:
    rows = run("trl_step", tmp_path, *TINY, *STEP, "--trl-batch", "4", "--trl-batch", "2")["rows"]
    sides = ["dro_rl", "TRL, batch 4", "TRL, batch 2"]
    assert [(row["policy"], row["side"]) for row in rows] == [(p, s) for p in ("fresh", "sharpened") for s in sides]
    for row in rows:
        assert len(row["seconds"]) == 2
        assert all(seconds > 0 for seconds in row["seconds"])
        assert all(len(numbers) == 3 for step in row["selections"] for _, numbers in step)
    assert {"rollout", "reward", "generator_step"} == rows[1]["phases"].keys()


@pytest.mark.slow
@pytest.mark.usefixtures("in_this_process")
def test_scaling_varies_one_size_at_a_time_and_draws_it(tmp_path: Path) -> None:
    sizes = ["--documents", "8", "--documents", "4", "--m", "4", "--m", "2", "--k", "3", "--width", "64"]
    written = run("scaling", tmp_path, *sizes, "--questions", "1", "--layers", "1", "--tokens", "8", "--steps", "2")
    varied = [(row["varied"], row["value"]) for row in written["rows"]]
    assert varied == [
        ("documents", 4), ("documents", 8), ("m", 2), ("m", 4), ("k", 3), ("width", 64), ("questions", 1),
        ("model", "128x1"),
    ]  # fmt: skip
    needed = {varied: row["operations"] for varied, row in zip(varied, written["rows"], strict=True)}
    assert max(needed["documents", 4]) < min(needed["documents", 8])
    assert all(0 <= row["own_share"] < 1 for row in written["rows"])
    assert (tmp_path / "scaling.png").stat().st_size > 1000


def test_a_case_runs_in_a_process_of_its_own(capfd: pytest.CaptureFixture[str]) -> None:
    assert harness.apart(held, mib=64) >= 64
    assert "held(mib=64)" in capfd.readouterr().err


def held(mib: int) -> float:
    """The peak after taking and giving back so much memory."""
    memory = harness.PeakMemory("cpu")
    torch.ones(mib * harness.MIB // 4).sum()
    return memory.mib()


def test_an_unknown_model_is_refused() -> None:
    for name in ("512", "500x4", "0x1", "x", "llama-70b"):
        with pytest.raises(typer.BadParameter, match="WIDTHxLAYERS"):
            harness.model_size(name)


@pytest.mark.parametrize(("sharpness", "least", "most"), [(0.0, 7.5, 8.0), (1.85, 3.5, 6.5)])
def test_a_written_policy_samples_whole_selections_as_sharp_as_asked(
    sharpness: float, least: float, most: float
) -> None:
    model = harness.build_model("128x2", "cpu", "float32").eval()
    world.write_policy(model, documents=20, k=5, sharpness=sharpness)
    [question] = world.questions(1, documents=20, tokens=4)
    tokenizer = world.tokenizer()
    prompt = Prompter(tokenizer, "selector").selector_prompt(question, 5).ids
    engine = Decoder(model, tokenizer.eos_token_id)
    groups = engine.generate(
        GenerationRequest([prompt] * 16, 8, SamplingParams(5 * world.TOKENS_PER_NUMBER), list(range(16)))
    )
    distinct = []
    for group in groups:
        selections = [parse_selection(tokenizer.decode(sample.ids), 20, 5).numbers for sample in group]
        assert all(len(numbers) == 5 for numbers in selections)
        assert [world.selection_tokens(numbers) for numbers in selections] == [sample.ids for sample in group]
        distinct.append(len(set(selections)))
    assert least <= sum(distinct) / len(distinct) <= most


def test_drawn_selections_have_the_number_of_distinct_ones_asked_for() -> None:
    for distinct in (8, 5, 1):
        drawn = world.selections_with(distinct, documents=20, k=5, m=8)
        assert len(drawn) == 8
        assert len(set(drawn)) == distinct
        assert all(len(set(numbers)) == 5 and min(numbers) >= 1 and max(numbers) <= 20 for numbers in drawn)


SIZE = harness.ModelSize(width=8, layers=3, heads=2, key_value_heads=1, intermediate=16, vocabulary=100)


def plain_count(sequences: list[tuple[int, ...]], predicting: int) -> float:
    """The formula over the set of all beginnings."""
    beginnings = {sequence[:length] for sequence in sequences for length in range(1, len(sequence) + 1)}
    weights = 8 * 8 * 2 + 8 * 4 * 2 + 3 * 8 * 16
    return 3 * sum(2 * weights + 4 * 8 * len(each) for each in beginnings) + 2 * 8 * 100 * predicting


@pytest.mark.parametrize(
    "sequences",
    [[(1, 2, 3)], [(1, 2, 3), (1, 2, 3)], [(1, 2, 3), (1, 2, 4, 5), (1, 2), (7, 2, 3), (1, 9)]],
)
def test_operations_count_each_beginning_once(sequences: list[tuple[int, ...]]) -> None:
    assert operations.forward(sequences, 4, SIZE) == plain_count(sequences, 4)


def test_a_step_needs_its_rollouts_and_three_passes_of_each_distinct_one() -> None:
    prompt, answer = (1, 2, 3, 4), (5,)
    selections = [(10, 11), (10, 12), (10, 11)]
    drawn = [(*prompt, 20 + i, 30 + i) for i in range(3)]
    expected = plain_count(drawn, 6) + 3 * plain_count([(*prompt, 10, 11), (*prompt, 10, 12)], 4)
    expected += 3 * plain_count([(6, 7, 5), (6, 8, 5)], 2)
    assert operations.step(prompt, selections, [(6, 7), (6, 8), (6, 7)], answer, SIZE) == expected


def test_make_bench_runs_every_benchmark(makefile: Callable[[], str]) -> None:
    for name in ("selector_update", "generator_update", "sampling_pass", "trl_step", "scaling", "one_card"):
        assert f"benchmarks.{name}" in makefile()


@pytest.fixture
def makefile() -> Callable[[], str]:
    return (Path(__file__).parent.parent / "Makefile").read_text


@pytest.mark.slow
def test_serving_loses_nothing_when_it_is_told_to_stop_in_the_middle(tmp_path: Path) -> None:
    """`dro-rl serve` as users start it, with clients that ask without a pause: answered, or refused in words."""
    *measured, stop = run("serving", tmp_path, "--seconds", "1", "--clients", "1", "--clients", "6")["rows"]
    assert [row["clients"] for row in measured] == [1, 6]
    assert all(row["answers"] == len(row["latencies"]) > 0 and set(row["ends"]) == {"answered"} for row in measured)
    assert measured[0]["batch"] == 1.0
    assert stop["status"] == 0
    assert set(stop["stopped"]) <= {"answered", "refused in words", "nobody to connect to"} | {"lost"}
    assert stop["stopped"].get("lost", 0) == 0
    assert stop["stopped"].get("refused in words", 0) + stop["stopped"].get("nobody to connect to", 0) == 6


# A lent card's minutes ---------------------------------------------------------------------------------------


def test_packed_rows_are_the_plain_path_up_to_rounding_and_the_table_says_so(tmp_path: Path, in_this_process) -> None:
    rows = run("exactness", tmp_path, *TINY, "--prompt", "40", "--completion", "4", "--m", "3", "--matrix", "64")[
        "rows"
    ]
    by_name = {row["what"]: row for row in rows if "what" in row}
    exact = by_name["packed against plain, float32"]
    assert exact["logps"] < 1e-4
    assert exact["gradient"] < 1e-4
    assert by_name["plain bfloat16 against plain float32"]["logps"] > exact["logps"]
    assert rows[-1]["tflops"] > 0


@pytest.mark.usefixtures("in_this_process")
def test_attention_is_compared_where_a_device_has_it(tmp_path: Path) -> None:
    sizes = ["--m", "3", "--prompt", "20", "--completion", "4", "--repeats", "1"]
    found = {row["way"]: row["measured"] for row in run("attention", tmp_path, *TINY, *sizes)["rows"]}
    assert list(found) == ["packed", "rows"]  # a CPU has no others
    for way in found:
        assert found[way]["values"] < 1e-6
        assert found[way]["gradients"] < 1e-6


def by_window(*states: Any, window_size: tuple[int, int], enable_gqa: bool) -> Tensor:
    """FlashAttention of variable length as torch 2.13 has it: all before, none after."""
    assert (window_size, enable_gqa) == ((-1, 0), True)
    return flash(*states)


def by_flag(*states: Any, is_causal: bool) -> Tensor:
    """As torch 2.10 has it, which shares the heads of keys without being told."""
    assert is_causal
    return flash(*states)


def flash(query: Tensor, key: Tensor, value: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int) -> Tensor:
    """What it does, sequence by sequence."""
    pieces = [slice(*each) for each in itertools.pairwise(cu_q.tolist())]
    assert {piece.stop - piece.start for piece in pieces} == {max_q}
    states = [[each[piece].movedim(0, 1)[None] for each in (query, key, value)] for piece in pieces]
    done = [nn.functional.scaled_dot_product_attention(*each, is_causal=True, enable_gqa=True) for each in states]
    return torch.cat([each[0].movedim(1, 0) for each in done])


@pytest.mark.parametrize("varlen", [by_window, by_flag])
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_what_only_a_gpu_runs_attends_as_the_dense_mask_does(
    monkeypatch: pytest.MonkeyPatch, varlen: Callable[..., Tensor]
) -> None:
    """Its layout and its mask, by slower kernels that a CPU has."""
    from benchmarks import attention

    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen)
    shape = attention.Shape(3, 20, 4)
    query, key, value = (torch.randn(1, heads, shape.tokens, 16) for heads in (4, 2, 2))
    expected = attention.dense((query, key, value), shape)
    for way in (attention._flex(shape, "cpu"), attention._varlen(shape, "cpu")):
        assert torch.allclose(way((query, key, value)), expected, atol=1e-5)


def test_the_list_ends_with_all_that_it_started(tmp_path: Path) -> None:
    """As a scheduler ends a job: SIGTERM to it alone."""
    command = [sys.executable, "-m", "benchmarks.gpu", "--device", "cpu", "--output", str(tmp_path)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as listed:
        assert listed.stderr is not None
        assert listed.stderr.readline().startswith("exact: ")
        children = psutil.Process(listed.pid).children()
        while not children:
            children = psutil.Process(listed.pid).children()
        listed.terminate()
    assert listed.returncode == 128 + signal.SIGTERM
    psutil.wait_procs(children, timeout=60)
    assert not [each for each in children if each.is_running() and each.status() != psutil.STATUS_ZOMBIE]


def test_a_part_that_fails_or_is_too_slow_is_said_and_the_next_goes_on(tmp_path: Path, monkeypatch) -> None:
    listed = [
        gpu.Part("missing", ("no_such_benchmark",), 60),
        gpu.Part("slow", ("timeit", "-n", "1", "-r", "1", "-s", "import time", "time.sleep(60)"), 1),
        gpu.Part("elsewhere", ("timeit",), 60, needs="no_such_module"),
        gpu.Part("unread", ("timeit",), 60, reads=(str(tmp_path), str(tmp_path / "data"))),
        gpu.Part("fine", ("timeit", "-n", "1", "-r", "1", "pass"), 60),
        gpu.Part("late", ("timeit",), 0),
    ]
    monkeypatch.setattr(gpu, "parts", lambda device, output: listed)
    gpu.main(minutes=5, device="cpu", output=tmp_path)
    found = {each["part"]: each["state"] for each in json.loads((tmp_path / "gpu.json").read_text())["parts"]}
    assert found["missing"].startswith("failed: ")
    assert "no_such_benchmark" in found["missing"]
    assert found["slow"] == "out of time"
    assert found["elsewhere"] == "left out: no_such_module is not installed"
    assert found["unread"] == f"left out: there is no {tmp_path / 'data'}"
    assert found["fine"] == "done"
    assert found["late"] == "left out: no time"


@pytest.mark.parametrize(
    "part", [part for part in gpu.parts("cpu", Path("out")) if part.name != "real"], ids=lambda part: part.name
)
@pytest.mark.usefixtures("in_this_process")
def test_each_benchmark_of_the_list_runs_on_a_cpu_as_it_is_listed(tmp_path: Path, part: gpu.Part) -> None:
    module, *options, output = part.arguments
    assert (options[-1], output) == ("--output", f"out/{part.name}")
    assert run(module.removeprefix("benchmarks."), tmp_path, *options[:-1])["rows"]


@pytest.mark.slow
def test_the_list_ends_in_a_training(tmp_path: Path) -> None:
    *_, training = gpu.parts("cpu", tmp_path)
    assert gpu.run(training, 500)["state"] == "done"
    assert (tmp_path / "real" / "selector").is_dir()


def test_a_policy_gets_off_a_place_where_rollouts_differ(tmp_path: Path) -> None:
    rows = run("collapse", tmp_path, "--m", "4", "--trainings", "40")["rows"]
    found = {(row["world"], row["rollouts"]): row for row in rows}
    assert len(found) == 12
    one, two, listed = (
        found["from 99 % on a place", name]["collapsed"] for name in ("m = 4", "m = 4, 2 orders", "all listed")
    )
    assert one > two + 0.1
    assert listed < 0.1
    lean = {name: found["nothing to tell by", name]["commonest"] for name in ("m = 4, 4 orders", "all listed")}
    assert lean["all listed"] < lean["m = 4, 4 orders"] - 0.1


# Looking into runs -------------------------------------------------------------------------------------------


def in_process(command: Sequence[str]) -> child.Taken:
    """A `dro-rl` in this process, which must end well; what it takes is no matter here."""
    assert tuple(command[:3]) == child.DRO_RL
    result = CliRunner().invoke(dro_rl_app, list(command[3:]), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return child.Taken(1.0, 1.0, 1.0)


def test_a_log_is_made_and_every_command_looks_into_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Defect: a column that was new in the log was missing here, and the benchmark could not run."""
    monkeypatch.setattr(child, "measure", in_process)
    rollout_log.generate(tmp_path, rollouts=8 * 160, iterations=2)
    rollout_log.main(rollouts=8 * 160, iterations=2, keep=tmp_path)
    *lines, last = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("1,280 rollouts, 2 iterations, 2 files")
    assert json.loads(last)["cases"].keys() == rollout_log.TARGETS.keys()
    assert len(lines) == 1 + len(rollout_log.TARGETS)


def test_commands_are_measured_on_runs_that_are_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(child, "measure", in_process)
    monkeypatch.setattr(commands, "SMALL", 8 * 20)
    monkeypatch.setattr(subprocess, "run", lambda command, check: exec(command[2], {}))
    commands.main(rollouts=8 * 20, dev=4, repeats=1, only="small")
    *lines, last = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[0][2:] for line in lines[2:]] == [
        "rollouts ls, small",
        "runs show, small",
        "report, small",
    ]
    assert all(row["page_mb"] is None or row["page_mb"] > 0.1 for row in json.loads(last)["cases"])


def test_a_child_is_measured_and_its_failure_is_an_end() -> None:
    """From a small process: a child's peak begins at what its parent holds."""
    code = (
        "import sys; from benchmarks.child import measure\n"
        "for words in ('', 'held = bytearray(64 * 2**20); sum(range(10**6))'):\n"
        "    taken = measure([sys.executable, '-c', words]); print(taken.peak_mib, taken.cpu_seconds)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    bare, held = (map(float, line.split()) for line in done.stdout.splitlines())
    (low, _), (high, busy) = bare, held
    assert high > low + 32
    assert busy > 0
    with pytest.raises(SystemExit, match="exit status 3"):
        child.measure([sys.executable, "-c", "raise SystemExit(3)"])
