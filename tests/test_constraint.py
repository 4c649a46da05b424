"""Claims about the constraint: it admits every selection, once, as the tokenizer writes it, and nothing else."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from random import Random

import pytest
import training_world
from conftest import build_tokenizer
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from dro_rl.errors import InputError
from dro_rl.prompts import Prompter
from dro_rl.selection import format_selection, parse_selection
from dro_rl.selection.constraint import SelectionConstraint

SPECIAL = ["<pad>", "<eos>", "<unk>"]
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def selections_as_text(count: int = 400) -> list[str]:
    """What the merges below are learned from: brackets, arrows and numbers, so that they reach over one another."""
    random = Random(5)
    return [format_selection(random.sample(range(1, 25), random.randint(1, 6))) for _ in range(count)]


def fast(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def byte_level(pattern: str, merges: int) -> PreTrainedTokenizerFast:
    """BPE on bytes within the pieces that a pattern cuts: GPT-2, Llama 3, Qwen."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=len(SPECIAL) + len(alphabet) + merges, special_tokens=SPECIAL, initial_alphabet=alphabet,
        show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator(selections_as_text(), trainer)
    return fast(tokenizer)


def merging(merges: int, longest: int) -> PreTrainedTokenizerFast:
    """BPE over whole lines, nothing keeping merges apart: `]▁>▁`, `▁[1`, `2]`."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    trainer = trainers.BpeTrainer(
        vocab_size=len(SPECIAL) + 14 + merges, special_tokens=SPECIAL, initial_alphabet=list("▁[]>0123456789"),
        max_token_length=longest, show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator(selections_as_text(), trainer)
    return fast(tokenizer)


def sentencepiece() -> PreTrainedTokenizerFast:
    """BPE within words that begin with their space, and one before the text: Llama 2, Mistral, Gemma."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(
        vocab_size=50, special_tokens=SPECIAL, initial_alphabet=list("▁[]>0123456789"), show_progress=False
    )
    tokenizer.train_from_iterator(selections_as_text(), trainer)
    return fast(tokenizer)


def unigram() -> PreTrainedTokenizerFast:
    """The other SentencePiece model: the likeliest cut of the whole line."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(split=False)
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=40, special_tokens=SPECIAL, unk_token="<unk>", max_piece_length=4,
        initial_alphabet=list("▁[]>0123456789"), show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator(selections_as_text(), trainer)
    return fast(tokenizer)


def split_digits() -> PreTrainedTokenizerFast:
    """A token a digit, whatever stands around it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(selections_as_text(), trainer)
    return fast(tokenizer)


def with_bos() -> PreTrainedTokenizerFast:
    """A tokenizer that puts a token of its own before every text: not before a completion."""
    made = byte_level(LLAMA3, 4)
    made.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<pad> $A", special_tokens=[("<pad>", 0)]
    )
    return made


TOKENIZERS: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "templates": build_tokenizer,
    "a token a number": training_world.tokenizer,
    "gpt-2": lambda: byte_level(GPT2, 40),
    "llama-3": lambda: byte_level(LLAMA3, 40),
    "digits": split_digits,
    "sentencepiece": sentencepiece,
    "merging": lambda: merging(8, longest=20),
    "merging, two characters": lambda: merging(40, longest=2),
    "merging, three characters": lambda: merging(80, longest=3),
    "merging, four characters": lambda: merging(120, longest=4),
    "unigram": unigram,
    "with a first token": with_bos,
}


@pytest.fixture(scope="module", params=TOKENIZERS)
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    return TOKENIZERS[request.param]()


@pytest.fixture(scope="module", params=[name for name in TOKENIZERS if name != "a token a number"])
def large(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    """Those whose vocabulary does not end at six."""
    return TOKENIZERS[request.param]()


def admitted(constraint: SelectionConstraint) -> Iterator[tuple[int, ...]]:
    """Every completion that the constraint lets through, by following all that is allowed."""
    open_ = [()]
    while open_:
        written = open_.pop()
        following = constraint.allowed(written)
        if not following:
            yield written
        open_ += [(*written, token) for token in following]


def written(tokenizer: PreTrainedTokenizerFast, n: int, k: int) -> list[tuple[int, ...]]:
    """Every selection as `Prompter.completion` writes it: what a warm-up teaches."""
    prompter = Prompter(tokenizer, "toy_selector")
    return [prompter.completion(format_selection(z)) for z in itertools.permutations(range(1, n + 1), k)]


@pytest.mark.parametrize(("n", "k"), [(1, 1), (4, 1), (4, 3), (3, 3), (5, 2)])
def test_it_admits_every_selection_once_in_the_tokenizers_spelling(tokenizer, n: int, k: int) -> None:
    constraint = SelectionConstraint(tokenizer, n, k)
    constraint.verify()
    assert sorted(admitted(constraint)) == sorted(written(tokenizer, n, k))


@pytest.mark.parametrize(("n", "k"), [(12, 2), (23, 2), (11, 3)])
def test_numbers_of_two_digits_are_told_from_their_first(large, n: int, k: int) -> None:
    constraint = SelectionConstraint(large, n, k)
    constraint.verify()
    assert sorted(admitted(constraint)) == sorted(written(large, n, k))


def test_with_fewer_candidates_than_asked_for_all_are_written(tokenizer) -> None:
    assert sorted(admitted(SelectionConstraint(tokenizer, 3, 5))) == sorted(written(tokenizer, 3, 3))


def written_from(tokenizer: PreTrainedTokenizerFast, n: int, least: int, most: int) -> list[tuple[int, ...]]:
    """Every selection of each length."""
    return [ids for k in range(least, most + 1) for ids in written(tokenizer, n, k)]


@pytest.mark.parametrize(("n", "least", "most"), [(1, 1, 1), (2, 1, 2), (4, 1, 3), (4, 2, 4), (5, 1, 2)])
def test_where_the_selector_decides_how_many_it_admits_every_list_of_each_length_once(
    tokenizer, n: int, least: int, most: int
) -> None:
    constraint = SelectionConstraint(tokenizer, n, most, least=least)
    longest = constraint.verify()
    expected = written_from(tokenizer, n, least, most)
    assert sorted(admitted(constraint)) == sorted(expected)
    assert constraint.count == len(expected)
    assert max(map(len, expected)) <= longest <= max(map(len, expected)) + most


@pytest.mark.parametrize(("n", "least", "most"), [(12, 1, 2), (23, 1, 2), (11, 2, 3)])
def test_the_end_is_told_from_a_second_digit(large, n: int, least: int, most: int) -> None:
    constraint = SelectionConstraint(large, n, most, least=least)
    constraint.verify()
    assert sorted(admitted(constraint)) == sorted(written_from(large, n, least, most))


@pytest.mark.parametrize(("n", "least", "most"), [(3, 1, 5), (2, 3, 5), (1, 1, 4)])
def test_with_fewer_candidates_the_ends_of_the_range_come_down(tokenizer, n: int, least: int, most: int) -> None:
    found = sorted(admitted(SelectionConstraint(tokenizer, n, most, least=least)))
    assert found == sorted(written_from(tokenizer, n, min(least, n), n))


def test_the_end_may_be_chosen_as_soon_as_there_are_enough_and_not_before() -> None:
    tokenizer = training_world.tokenizer()
    constraint = SelectionConstraint(tokenizer, 5, 3, least=2)
    ids = Prompter(tokenizer, "toy_selector").completion(format_selection([4, 2, 1]))
    end = [i for i in range(len(ids)) if constraint.end in constraint.allowed(ids[:i])]
    assert end == [3, 5]  # after `[4] > [2]`, and after `[4] > [2] > [1]`
    assert constraint.allowed(ids[:5]) == (constraint.end,)


def test_the_vocabularies_are_as_different_as_their_names(tokenizer, request) -> None:
    """Guards the tests above: tokens that are a number, a digit, part of an arrow, and that reach over a cut."""
    tokens = tokenizer.convert_ids_to_tokens(tokenizer("[1] > [12] > [3]", add_special_tokens=False)["input_ids"])
    kind = request.node.callspec.params["tokenizer"]
    expected = {
        "templates": ["[", "1", "]", "Ġ", ">", "Ġ", "[", "1", "2", "]", "Ġ", ">", "Ġ", "[", "3", "]"],
        "a token a number": ["[1]", ">", "<unk>", ">", "[3]"],
        "gpt-2": ["[", "1", "]", "Ġ>", "Ġ[", "12", "]", "Ġ>", "Ġ[", "3", "]"],
        "llama-3": ["[", "1", "]", "Ġ>", "Ġ[", "12", "]", "Ġ>", "Ġ[", "3", "]"],
        "digits": ["[", "1", "]", "Ġ>", "Ġ[", "1", "2", "]", "Ġ>", "Ġ[", "3", "]"],
        "sentencepiece": ["▁[1]", "▁>", "▁[12]", "▁>", "▁[3]"],
        "merging": ["▁[1", "]▁>▁[1", "2", "]▁>▁[", "3", "]"],
        "merging, two characters": ["▁[", "1", "]▁", ">", "▁[", "12", "]▁", ">", "▁[", "3]"],
        "merging, four characters": ["▁[1", "]▁", ">▁[", "1", "2]▁", ">▁[", "3]"],
        "unigram": ["▁[", "1]", "▁>▁[", "12]", "▁>▁[", "3]"],
    }
    assert tokens == expected.get(kind, tokens)


def test_thousands_of_random_walks_are_valid_and_distinct_numbers(large) -> None:
    """N = 20, K = 5: too many to enumerate."""
    constraint = SelectionConstraint(large, 20, 5)
    longest = constraint.verify()
    prompter = Prompter(large, "toy_selector")
    random = Random(1)
    for _ in range(1000):
        ids: tuple[int, ...] = ()
        while following := constraint.allowed(ids):
            ids = (*ids, random.choice(following))
        selection = parse_selection(prompter.decode(ids), 20, 5)
        assert not selection.problems
        assert len(selection.numbers) == 5
        assert ids == prompter.completion(format_selection(selection.numbers))
        assert len(ids) <= longest


def test_the_longest_selection_is_known(tokenizer) -> None:
    for n, k in ((1, 1), (5, 1), (5, 2), (6, 4)):
        longest = max(map(len, written(tokenizer, n, k)))
        assert longest <= SelectionConstraint(tokenizer, n, k).verify() <= longest + k


@pytest.mark.parametrize(("n", "k"), [(3, 3), (4, 3), (5, 3)])
def test_a_spelling_that_only_used_numbers_may_follow_is_not_begun(n: int, k: int) -> None:
    """How a number is merged says here which one comes next, and that may be one that is taken."""
    merged = merging(16, longest=20)
    constraint = SelectionConstraint(merged, n, k)
    constraint.verify()
    assert sorted(admitted(constraint)) == sorted(written(merged, n, k))


def test_what_was_forgotten_is_followed_again(tokenizer) -> None:
    """The cache is a cache."""
    constraint = SelectionConstraint(tokenizer, 5, 3)
    completions = list(admitted(constraint))
    before = [constraint.allowed_along(ids) for ids in completions]
    constraint._continuations.cache_clear()
    assert [constraint.allowed_along(ids) for ids in reversed(completions)] == before[::-1]


def test_what_begins_no_selection_is_refused(tokenizer) -> None:
    constraint = SelectionConstraint(tokenizer, 5, 3)
    with pytest.raises(ValueError, match="not the beginning"):
        constraint.allowed((tokenizer.eos_token_id,) * 2)
    with pytest.raises(ValueError, match="not the beginning"):
        constraint.allowed((2, 2))


def test_a_tokenizer_that_cannot_write_a_number_is_refused() -> None:
    """`[7]` is unknown here."""
    with pytest.raises(InputError, match=r"constrain_selection: .*\[7\]"):
        SelectionConstraint(training_world.tokenizer(), 7, 2).verify()


def test_a_tokenizer_that_looks_further_than_the_neighbours_is_refused() -> None:
    """Merges as long as a number with its arrow: how they fall depends on how they fell all along the list."""
    with pytest.raises(InputError, match="by itself and its neighbours"):
        SelectionConstraint(merging(90, longest=20), 12, 5).verify()


@pytest.mark.parametrize(("n", "k", "least"), [(0, 1, None), (3, 0, None), (3, 2, 0), (3, 2, 3)])
def test_nothing_to_select_is_an_error(n: int, k: int, least: int | None) -> None:
    with pytest.raises(ValueError, match="nothing to select"):
        SelectionConstraint(training_world.tokenizer(), n, k, least=least)
