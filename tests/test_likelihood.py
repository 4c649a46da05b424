"""Claims about completion log-probabilities: every path has the numbers and gradients of the naive one."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
import transformers
from conftest import ARCHITECTURES, VOCABULARY
from torch import Tensor

from dro_rl import likelihood
from dro_rl.likelihood import answer_logp, completion_logps, passes, row_logps, score_rows
from dro_rl.likelihood.attention import ARCHITECTURES as PACKED
from dro_rl.likelihood.attention import cuts, takes_packed_rows
from dro_rl.likelihood.packing import Row, lay_out

PATHS = pytest.mark.parametrize("shared", [True, False], ids=["shared", "plain"])
EVERY_ARCHITECTURE = pytest.mark.parametrize("architecture", ARCHITECTURES)


def tokens(count: int, seed: int) -> list[int]:
    return [random.Random(f"{seed}/{i}").randrange(2, VOCABULARY) for i in range(count)]


PROMPT = tokens(23, 0)
RAGGED = [tokens(5, 1), tokens(1, 2), tokens(9, 3), tokens(5, 1), tokens(2, 4)]
"""Completions of many lengths: one of a single token, two that are equal."""


def naive(model, prompt: list[int], completion: list[int]) -> Tensor:
    """One unpadded sequence, logits everywhere, the whole log-softmax."""
    logps = model(torch.tensor([[*prompt, *completion]])).logits[0].float().log_softmax(-1)
    at = torch.arange(len(prompt) - 1, len(prompt) + len(completion) - 1)
    return logps[at, torch.tensor(completion)]


def gradients(model, logps: list[Tensor]) -> dict[str, Tensor]:
    """Of a sum with a different weight for each token, so that no two cancel."""
    model.zero_grad()
    flat = torch.cat(list(logps))
    (flat * torch.linspace(-1, 2, len(flat))).sum().backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_same(first: dict[str, Tensor], second: dict[str, Tensor], rtol: float = 1e-4) -> None:
    """Gradients agree to `rtol` of each tensor's own largest entry."""
    assert first.keys() == second.keys()
    for name, expected in second.items():
        scale = expected.abs().max().item()
        torch.testing.assert_close(first[name], expected, rtol=0, atol=rtol * scale + 1e-7)


def any_model(architecture: str):
    """A tiny model of any architecture that packs, with weights large enough for softcaps and scales to show."""
    torch.manual_seed(0)
    settings = {
        "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "initializer_range": 0.4, "pad_token_id": 0,
        "bos_token_id": None, "eos_token_id": 1, "layer_types": ["sliding_attention", "full_attention"],
    }  # fmt: skip
    if architecture.startswith("gemma"):
        settings |= {"head_dim": 16}
    if architecture == "granite":
        settings |= {"logits_scaling": 3.0}
    if architecture != "gemma3_text":
        del settings["layer_types"]
    config = transformers.CONFIG_MAPPING[architecture](**settings)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


@EVERY_ARCHITECTURE
def test_both_paths_give_the_naive_log_probabilities_and_gradients(make_model, architecture: str) -> None:
    model = make_model(architecture)
    expected = [naive(model, PROMPT, completion) for completion in RAGGED]
    expected_gradients = gradients(model, expected)
    assert all(g.abs().max() > 1e-3 for g in expected_gradients.values())
    for shared in (True, False):
        found = completion_logps(model, PROMPT, RAGGED, shared_prefix=shared)
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-5)
        assert_same(gradients(model, found), expected_gradients)


@EVERY_ARCHITECTURE
def test_the_shared_path_is_taken_where_it_is_claimed(make_model, architecture: str) -> None:
    """Guards the test above against comparing the plain path with itself: one sequence goes in, not five."""
    model = make_model(architecture)
    seen: list[tuple[int, ...]] = []
    model.get_input_embeddings().register_forward_hook(lambda _, args, __: seen.append(tuple(args[0].shape)))
    completion_logps(model, PROMPT, RAGGED)
    completion_logps(model, PROMPT, RAGGED, shared_prefix=False)
    assert seen == [(1, 23 + 22), (5, 23 + 9)]


@PATHS
def test_logits_over_the_prompt_are_never_made(make_model, shared: bool) -> None:
    """The head sees the completions and the one position before them: a long prompt's fill a GPU."""
    model = make_model()
    lengths: list[int] = []
    model.lm_head.register_forward_hook(lambda _, args, __: lengths.append(args[0].shape[-2]))
    completion_logps(model, tokens(200, 0), RAGGED, shared_prefix=shared)
    assert lengths == [1 + 22 - 5 if shared else 9 + 1]


@PATHS
def test_one_completion_of_one_token(make_model, shared: bool) -> None:
    model = make_model()
    (found,) = completion_logps(model, PROMPT, [[7]], shared_prefix=shared)
    torch.testing.assert_close(found, naive(model, PROMPT, [7]), rtol=0, atol=1e-5)


@PATHS
def test_a_prompt_of_one_token(make_model, shared: bool) -> None:
    model = make_model()
    found = completion_logps(model, [5], RAGGED, shared_prefix=shared)
    torch.testing.assert_close(found[2], naive(model, [5], RAGGED[2]), rtol=0, atol=1e-5)


def test_equal_completions_have_equal_log_probabilities(make_model) -> None:
    found = completion_logps(make_model(), PROMPT, RAGGED)
    torch.testing.assert_close(found[0], found[3], rtol=0, atol=1e-5)


@PATHS
@pytest.mark.parametrize("bad", [([], [[1]]), ([1], []), ([1], [[2], []])])
def test_rows_without_a_token_to_stand_on_are_refused(make_model, shared: bool, bad) -> None:
    with pytest.raises(ValueError, match="no empty completion"):
        completion_logps(make_model(), *bad, shared_prefix=shared)


# Rows and batches -------------------------------------------------------------------------------------------


ROWS = [
    Row(tokens(31, 10), [tokens(3, 11), tokens(8, 12)]),
    Row(tokens(4, 13), [tokens(1, 14)]),
    Row(tokens(17, 15), [tokens(6, 16), tokens(2, 17), tokens(6, 16), tokens(1, 18)]),
    Row(tokens(40, 19), [tokens(2, 20), tokens(12, 21), tokens(1, 22)]),
]


@PATHS
@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
def test_rows_that_share_a_pass_do_not_touch(make_model, architecture: str, shared: bool) -> None:
    """Padding, packing and neighbours change neither values nor gradients."""
    model = make_model(architecture)
    expected = [naive(model, list(row.prompt), list(c)) for row in ROWS for c in row.completions]
    found = [logps for row in row_logps(model, ROWS, shared_prefix=shared) for logps in row]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)
    assert_same(gradients(model, found), gradients(model, expected))


@PATHS
@pytest.mark.parametrize("order", [[0, 1, 2, 3], [2, 0, 3, 1]])
def test_scores_do_not_depend_on_batch_size_or_order(make_model, shared: bool, order: list[int]) -> None:
    model = make_model()
    alone = score_rows(model, ROWS, 1, shared)
    together = score_rows(model, [ROWS[i] for i in order], 8, shared)
    for place, i in enumerate(order):
        for one, other in zip(together[place], alone[i], strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


def test_scores_of_nothing_are_nothing(make_model) -> None:
    assert score_rows(make_model(), [], 8) == []


def test_scoring_keeps_no_gradient(make_model) -> None:
    assert not score_rows(make_model(), ROWS[:1], 8)[0][0].requires_grad


@pytest.mark.parametrize(
    ("sizes", "runs"),
    [
        ([], []),
        ([5], [[0]]),
        ([99], [[0]]),
        ([4, 4, 4], [[0, 1], [2]]),
        ([99, 1, 9], [[0], [1, 2]]),
        ([6, 5, 5, 1], [[0], [1, 2], [3]]),
    ],
)
def test_a_pass_holds_no_more_than_its_tokens(sizes: list[int], runs: list[list[int]]) -> None:
    assert passes(sizes, 10) == runs


@PATHS
def test_scoring_goes_by_tokens(make_model, shared: bool) -> None:
    """Rows have 42, 5, 32 and 55 tokens packed; on the plain path 78, 5, 92 and 156 before padding."""
    model = make_model()
    seen: list[int] = []
    model.get_input_embeddings().register_forward_hook(lambda _, args, __: seen.append(args[0].numel()))
    score_rows(model, ROWS, 100, shared)
    assert seen == ([42 + 5 + 32, 55] if shared else [3 * 52, 2 * 39, 5 * 23])


# The head, a chunk at a time --------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", sorted(PACKED))
@pytest.mark.parametrize("rows", [1, 7])
def test_a_chunked_head_changes_nothing(make_model, monkeypatch, architecture: str, rows: int) -> None:
    """Softcapped and scaled logits too. Chunks are computed again for the gradient, never kept."""
    model = any_model(architecture)
    expected = completion_logps(model, PROMPT, RAGGED)
    expected_gradients = gradients(model, expected)
    monkeypatch.setattr(likelihood, "LOGITS_PER_CHUNK", rows * VOCABULARY)
    seen: list[int] = []
    model.lm_head.register_forward_hook(lambda _, args, __: seen.append(args[0].shape[0]))
    found = completion_logps(model, PROMPT, RAGGED)
    assert max(seen) == rows
    assert sum(seen) == 1 + 22 - 5
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)
    assert_same(gradients(model, found), expected_gradients)


# The prefix tree --------------------------------------------------------------------------------------------


HEADER, FIRST, SECOND, THIRD = tokens(20, 30), tokens(70, 31), tokens(80, 32), tokens(90, 33)
TREE = [
    Row(HEADER + FIRST + SECOND, [tokens(4, 40)]),
    Row(HEADER + THIRD, [tokens(2, 41), tokens(5, 42)]),
    Row(HEADER + FIRST + THIRD, [tokens(3, 43)]),
    Row(HEADER + FIRST, [tokens(6, 44)]),
    Row(HEADER + FIRST + SECOND, [tokens(1, 45), tokens(4, 40)]),
    Row(tokens(9, 34), [tokens(3, 46)]),
]


@EVERY_ARCHITECTURE
@pytest.mark.parametrize("order", [[0, 1, 2, 3, 4, 5], [5, 4, 3, 2, 1, 0], [2, 0, 5, 3, 1, 4]])
def test_a_prefix_tree_is_exact(make_model, architecture: str, order: list[int]) -> None:
    """Beginnings shared by all, by some, whole prompts that are equal or within another: values and gradients."""
    model = make_model(architecture)
    rows = [TREE[i] for i in order]
    expected = [naive(model, list(row.prompt), list(c)) for row in rows for c in row.completions]
    found = [logps for row in row_logps(model, rows, prefix_tree=True) for logps in row]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=2e-5)
    assert_same(gradients(model, found), gradients(model, expected))


def test_a_prefix_tree_computes_a_beginning_once() -> None:
    """The header and the first document once, the second once; the third, after another beginning, twice."""
    layout = lay_out(TREE, prefix_tree=True)
    completions = sum(len(c) for row in TREE for c in row.completions)
    assert len(layout.ids) == 20 + 70 + 80 + 90 + (20 + 90) + 9 + completions
    assert len(lay_out(TREE).ids) == sum(map(len, TREE))


@pytest.mark.parametrize("tree", [False, True], ids=["rows alone", "as a tree"])
def test_rows_that_look_at_nothing_of_each_other_are_cut_apart_once(tree: bool) -> None:
    """Cut out of the whole by each segment, every one's gradient would be as long as all rows."""
    segments = lay_out(TREE, prefix_tree=tree).segments
    starts = cuts(segments)
    pieces = [piece for segment in segments for piece in segment.keys]
    assert all(not piece.start < start < piece.stop for piece in pieces for start in starts)
    assert starts == sorted(set(starts))
    if tree:
        assert len(starts) > 3, "branches that do not follow their stem too"
    else:
        assert starts == [0, *itertools.accumulate(map(len, TREE))][:-1]


def test_scoring_keeps_the_rows_of_a_question_together(make_model) -> None:
    """Sorted by length they would stand in different passes, and share nothing."""
    model = make_model()
    rows = [
        Row(tokens(80, question) + tokens(length, 100 * question + length), [[3]])
        for question in range(3)
        for length in (5, 60, 25)
    ]
    seen: list[int] = []
    model.get_input_embeddings().register_forward_hook(lambda _, args, __: seen.append(args[0].numel()))
    score_rows(model, rows, 3 * 80 + 90 + 3, prefix_tree=True)
    assert seen == [80 + 90 + 3] * 3


def test_short_or_rare_beginnings_are_not_shared() -> None:
    """They would trade the causal kernel for a masked one and save nothing."""
    short = [Row(tokens(63, 1) + tokens(9, seed), [[3]]) for seed in (2, 3)]
    rare = [Row(tokens(64, 1) + tokens(300, seed), [[3]]) for seed in (2, 3)]
    for rows in (short, rare):
        layout = lay_out(rows, prefix_tree=True)
        assert len(layout.ids) == sum(map(len, rows))
        assert all(segment.mask is None for segment in layout.segments)


def test_every_token_of_a_layout_sees_its_own_row_and_nothing_else() -> None:
    """By brute force: what the segments allow, followed from each completion's end, spells the row."""
    layout = lay_out(TREE, prefix_tree=True)
    seen: list[list[int]] = []
    for segment in layout.segments:
        keys = [place for piece in segment.keys for place in range(piece.start, piece.stop)]
        count = segment.queries.stop - segment.queries.start
        mask = torch.ones(count, count).tril().bool() if segment.mask is None else segment.mask
        seen += [[keys[k] for k in row.nonzero().squeeze(-1).tolist()] for row in mask]
    assert len(seen) == len(layout.ids)
    for i, row in enumerate(TREE):
        for j, completion in enumerate(row.completions):
            last_source = layout.sources[i][j][-1]
            read = [layout.ids[place] for place in seen[last_source]]
            assert read == [*row.prompt, *completion[:-1]]
            assert [layout.positions[place] for place in seen[last_source]] == list(range(len(read)))


# Ways to run a model ----------------------------------------------------------------------------------------


@PATHS
def test_gradient_checkpointing_changes_nothing(make_model, shared: bool) -> None:
    model = make_model().train()
    expected = gradients(model, completion_logps(model, PROMPT, RAGGED, shared_prefix=shared))
    model.gradient_checkpointing_enable()
    assert_same(gradients(model, completion_logps(model, PROMPT, RAGGED, shared_prefix=shared)), expected)


@EVERY_ARCHITECTURE
def test_eager_attention_takes_the_plain_path(make_model, architecture: str) -> None:
    model = make_model(architecture)
    model.set_attn_implementation("eager")
    expected = [naive(model, PROMPT, completion) for completion in RAGGED]
    assert not takes_packed_rows(model, 1)
    for one, other in zip(completion_logps(model, PROMPT, RAGGED), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


@EVERY_ARCHITECTURE
def test_a_model_that_has_packed_is_as_before_elsewhere(make_model, architecture: str) -> None:
    """Packing puts an attention of ours into the model. Plain, padded and cached calls do not notice."""
    model = make_model(architecture)
    ids = torch.tensor([[0] * 4 + PROMPT[:9], PROMPT[:13]])
    mask = (torch.arange(13) >= torch.tensor([[4], [0]])).long()
    calls = (
        lambda: model(ids[1:]).logits,
        lambda: model(ids, attention_mask=mask).logits[0, 4:],
        lambda: model.generate(ids[1:], max_new_tokens=4, do_sample=False).float(),
    )
    before = [call() for call in calls]
    completion_logps(model, PROMPT, RAGGED)
    for call, expected in zip(calls, before, strict=True):
        torch.testing.assert_close(call(), expected, rtol=0, atol=1e-5)


def test_a_model_that_has_packed_saves_no_trace_of_it(make_model, tmp_path) -> None:
    """Another program must be able to load it."""
    model = make_model()
    completion_logps(model, PROMPT, RAGGED)
    model.save_pretrained(tmp_path)
    assert "packed" not in (tmp_path / "config.json").read_text()


@PATHS
@pytest.mark.parametrize("how", ["weights", "autocast"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_bfloat16_is_close(make_model, shared: bool, how: str, attention: str) -> None:
    """Log-probabilities come in float32, whatever the model computes in."""
    model = make_model(initializer_range=0.2)
    expected = torch.cat([naive(model, PROMPT, completion) for completion in RAGGED])
    model.set_attn_implementation(attention)
    if how == "weights":
        model = model.to(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        found = torch.cat(completion_logps(model, PROMPT, RAGGED, shared_prefix=shared))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=0, atol=0.1)


@PATHS
def test_adapters_give_the_same(make_model, shared: bool) -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(make_model(), peft.LoraConfig(r=4, target_modules="all-linear"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    expected = [naive(model, PROMPT, completion) for completion in RAGGED]
    with model.disable_adapter():
        assert (naive(model, PROMPT, RAGGED[2]) - expected[2]).abs().max() > 0.01
    found = completion_logps(model, PROMPT, RAGGED, shared_prefix=shared)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)
    assert_same(gradients(model, found), gradients(model, expected))


class Stand:
    """What stands for a sharded model: the protocol `likelihood.Model`, and no more."""

    def __init__(self, model) -> None:
        self.model, self.config, self.device = model, model.config, model.device

    def set_attn_implementation(self, name: str) -> None:
        self.model.set_attn_implementation(name)

    def __call__(self, **inputs):
        return self.model(**inputs)

    def within(self, function, *arguments):
        return function(self.model, *arguments)


def test_what_stands_for_a_model_is_enough(make_model) -> None:
    """Under FSDP and ZeRO-3 a role is called through the wrapped module."""
    model = make_model()
    expected = [naive(model, PROMPT, completion) for completion in RAGGED]
    for one, other in zip(completion_logps(Stand(model), PROMPT, RAGGED), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


# Where packed rows are not exact ----------------------------------------------------------------------------


SLIDING = pytest.mark.parametrize("architecture", ["mistral", "gemma2"])


@SLIDING
def test_a_window_narrower_than_the_sequence_takes_the_plain_path(make_model, architecture: str) -> None:
    """Packed rows know no window. Forced onto them, the model reads too far and is wrong."""
    model = make_model(architecture, sliding_window=8)
    expected = torch.cat([naive(model, PROMPT, completion) for completion in RAGGED])
    found = torch.cat(completion_logps(model, PROMPT, RAGGED, shared_prefix=True))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert takes_packed_rows(model, 8)
    rows = [Row(PROMPT, RAGGED)]
    forced = torch.cat(likelihood._packed(model, lay_out(rows), rows))
    assert (forced - expected).abs().max() > 0.05


@SLIDING
@pytest.mark.parametrize("window", [32, 31])
def test_a_window_as_wide_as_prompt_and_completion_is_wide_enough(make_model, architecture: str, window: int) -> None:
    """23 + 9 tokens: the row's other completions do not count, since positions restart after the prompt."""
    model = make_model(architecture, sliding_window=window)
    assert takes_packed_rows(model, 32) == (window == 32)
    expected = [naive(model, PROMPT, completion) for completion in RAGGED]
    for one, other in zip(completion_logps(model, PROMPT, RAGGED), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


def test_a_qwen2_that_does_not_use_its_window_shares_prefixes(make_model) -> None:
    """Its config names a window that no layer has."""
    model = make_model("qwen2", sliding_window=8, use_sliding_window=False)
    assert takes_packed_rows(model, 1000)
    sliding = make_model("qwen2", sliding_window=8, use_sliding_window=True, max_window_layers=0)
    assert not takes_packed_rows(sliding, 9)
    found = completion_logps(sliding, PROMPT, RAGGED)
    torch.testing.assert_close(found[2], naive(sliding, PROMPT, RAGGED[2]), rtol=0, atol=1e-5)


@pytest.mark.parametrize("attention", ["flash_attention_2", "flash_attention_3", "flex_attention", "kernels/x"])
def test_another_attention_takes_the_plain_path(make_model, attention: str) -> None:
    model = make_model()
    model.config._attn_implementation_internal = attention
    assert model.config._attn_implementation == attention
    assert not takes_packed_rows(model, 1)


def test_an_architecture_not_known_to_pack_takes_the_plain_path() -> None:
    """Its positions are absolute: padding must not move them."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=2, initializer_range=0.4)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    assert not takes_packed_rows(model, 1)
    found = completion_logps(model, PROMPT, RAGGED)
    for one, completion in zip(found, RAGGED, strict=True):
        torch.testing.assert_close(one, naive(model, PROMPT, completion), rtol=0, atol=1e-5)


@pytest.mark.parametrize("architecture", sorted(PACKED - ARCHITECTURES.keys()))
def test_the_other_architectures_that_pack_are_exact_too(architecture: str) -> None:
    model = any_model(architecture)
    expected = [naive(model, PROMPT, completion) for completion in RAGGED]
    assert takes_packed_rows(model, 32)
    found = completion_logps(model, PROMPT, RAGGED)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)
    assert_same(gradients(model, found), gradients(model, expected))


# One likelihood of the accepted answers ---------------------------------------------------------------------


ALIASES = [torch.tensor([-1.0, -2.0]), torch.tensor([-0.5, -0.25, -0.25])]


@pytest.mark.parametrize(
    ("kind", "aliases", "expected"),
    [
        ("sum", "first", -3.0),
        ("mean", "first", -1.5),
        ("sum", "max", -1.0),
        ("mean", "max", -1 / 3),
        ("sum", "logsumexp", -1 + 0.126928),
    ],
)
def test_answers_make_one_likelihood(kind: str, aliases: str, expected: float) -> None:
    assert answer_logp(ALIASES, kind, aliases).item() == pytest.approx(expected, abs=1e-6)


def test_the_sum_over_tokens_of_the_first_answer_is_the_default() -> None:
    assert answer_logp(ALIASES).item() == -3.0
