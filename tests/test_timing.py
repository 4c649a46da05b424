"""Claims about the clock: every second belongs to one phase."""

from __future__ import annotations

import pytest
import torch

from dro_rl.em import timing
from dro_rl.em.timing import Phase, PhaseClock, flops_per_token, peak_flops, rates


@pytest.fixture
def now(monkeypatch) -> list[float]:
    moment = [0.0]
    monkeypatch.setattr(timing, "now", lambda: moment[0])
    return moment


def test_every_second_goes_to_the_innermost_open_phase(now) -> None:
    clock = PhaseClock(since=0.0)
    now[0] = 1
    with clock.phase("rollout"):
        now[0] = 3
        with clock.phase("inputs"):
            now[0] = 7
        now[0] = 8
    before = clock.switch("selector")
    now[0] = 24
    clock.switch("generator")
    now[0] = 56
    clock.switch(before)
    found = {name: phase.seconds for name, phase in clock.flush().items()}
    assert found == {"other": 1, "rollout": 3, "inputs": 4, "selector": 16, "generator": 32}
    assert sum(found.values()) == now[0]


def test_an_error_ends_its_phase(now) -> None:
    clock = PhaseClock(since=0.0)

    def fail() -> None:
        with clock.phase("rollout"):
            now[0] = 2
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    now[0] = 5
    assert {name: phase.seconds for name, phase in clock.flush().items()} == {"rollout": 2, "other": 3}


def test_logs_are_of_the_time_since_the_last_and_totals_of_all(now) -> None:
    clock = PhaseClock(since=0.0)
    for seconds in (1.0, 2.0):
        with clock.phase("generator"):
            clock.count("generator", tokens=10, flops=100.0)
            now[0] += seconds
        assert clock.flush()["generator"].seconds == seconds
    assert clock.total["generator"] == Phase(seconds=3.0, tokens=20, flops=200.0)


def test_rates() -> None:
    phases = {"selector": Phase(2.0, 100, 3e12), "other": Phase(1.0)}
    assert rates(phases, None) == {"time/selector": 2.0, "tokens_per_second/selector": 50.0, "time/other": 1.0}
    assert rates(phases, 15e12)["mfu/selector"] == 0.1


def test_operations_are_of_the_weights_between_embedding_and_head(make_model) -> None:
    model = make_model()
    inner = sum(p.numel() for layer in model.model.layers for p in layer.parameters()) + model.model.norm.weight.numel()
    assert flops_per_token(model) == (2 * inner, 6 * inner)
    assert flops_per_token(model.requires_grad_(False)) == (2 * inner, 4 * inner)


def test_adapters_save_the_gradient_of_the_frozen_weights(make_model) -> None:
    peft = pytest.importorskip("peft")
    whole = flops_per_token(make_model())
    model = peft.get_peft_model(make_model(), peft.LoraConfig(r=2, target_modules="all-linear"))
    adapters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    forward = whole.forward + 2 * adapters
    assert flops_per_token(model) == (forward, 2 * forward + 2 * adapters)


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA A10G", None),
        ("Some card", None),
    ],
)
def test_the_peak_is_that_of_the_card_or_unknown(monkeypatch, name: str, peak: float | None) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(torch.device("cuda", 0)) == peak
    assert peak_flops(torch.device("cpu")) is None
