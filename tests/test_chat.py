"""Claims about chat templates: where a completion ends, that thinking is off, and which are refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import training_world
from conftest import CHAT_TEMPLATE, build_tokenizer
from tokenizers import AddedToken, normalizers
from transformers import GenerationConfig

from dro_rl.engines.decoding import Decoder
from dro_rl.engines.protocol import GenerationRequest
from dro_rl.engines.vllm_common import request_options
from dro_rl.errors import InputError
from dro_rl.likelihood import completion_logps
from dro_rl.models.loading import declared_ends
from dro_rl.models.saving import export_role
from dro_rl.pipeline import PipelineSettings, RAGPipeline, save_settings
from dro_rl.prompts import Prompter
from dro_rl.prompts.defusing import Defuser
from dro_rl.proposal import SamplingParams

EOS, START, END = 1, 2, 3


def chat(template: str, **special: str):
    """The chat tokenizer with another template: `<eos>` is 1, `<|start|>` 2, `<|end|>` 3."""
    tokenizer = build_tokenizer(chat=True)
    tokenizer.chat_template = template
    return tokenizer


# Ends -------------------------------------------------------------------------------------------------------

BARE = "{% for m in messages %}{{ m['content'] }}END{% endfor %}"


@pytest.mark.parametrize(
    ("end", "written"),
    [("<|end|>\n", END), ("<eos>", EOS), (" <eos>", EOS), ("<|end|><eos>", END), ("\n\nUser:", EOS), ("", EOS)],
)
def test_a_gold_answer_ends_as_the_template_ends_a_turn(end: str, written: int) -> None:
    prompter = Prompter(chat(BARE.replace("END", end)), "generator")
    assert prompter.completion("heron")[-1] == written
    assert prompter.ends.written == written


@pytest.mark.parametrize(
    ("declared", "written"), [((), EOS), ((EOS,), EOS), ((9, EOS), EOS), ((9, 8), 9), ((10**6,), EOS)]
)
def test_without_a_template_it_ends_as_the_tokenizer_says_unless_the_model_declares_others(declared, written) -> None:
    assert Prompter(build_tokenizer(), "generator", declared_ends=declared).ends.written == written


def test_a_template_that_takes_no_answers_leaves_the_tokenizers_end() -> None:
    template = "{% if messages | length > 1 %}{{ raise_exception('one') }}{% endif %}{{ messages[0]['content'] }}"
    assert Prompter(chat(template), "generator").ends.written == EOS


def test_every_declared_end_ends_a_completion() -> None:
    """The tokenizer's, the template's and the model's; what the vocabulary does not have is none."""
    tokenizer = build_tokenizer(chat=True)
    assert Prompter(tokenizer, "generator").ends.stops == (EOS, END)
    assert Prompter(tokenizer, "generator", declared_ends=(START, 9, 10**6)).ends.stops == (EOS, START, END, 9)
    assert Prompter(build_tokenizer(), "generator", declared_ends=(9,)).ends.stops == (EOS, 9)


@pytest.mark.parametrize("declared", [3, [3, 1], [9, 8, 7]])
def test_a_model_declares_its_ends_in_its_generation_config(tmp_path: Path, declared: int | list[int]) -> None:
    folder = training_world.save_model(tmp_path / "m", 0)
    GenerationConfig(eos_token_id=declared).save_pretrained(folder)
    assert declared_ends(str(folder)) == tuple([declared] if isinstance(declared, int) else declared)
    (folder / "generation_config.json").unlink()
    assert declared_ends(str(folder)) == (1,)


def test_sampling_stops_at_each_end_and_says_its_probability(make_model) -> None:
    model, ends = make_model(vocab_size=8), (1, 5)
    samples = Decoder(model, ends).generate(GenerationRequest([[2, 3, 4]], 32, SamplingParams(12), [0]))[0]
    stopped = [sample.ids for sample in samples if set(sample.ids) & set(ends)]
    assert {ids[-1] for ids in stopped} == set(ends)
    assert all(not set(ids[:-1]) & set(ends) for ids in stopped)
    for sample in samples:
        (logps,) = completion_logps(model, [2, 3, 4], [sample.ids])
        assert sample.logps == pytest.approx(logps.tolist(), abs=1e-4)


def test_one_end_and_a_list_of_one_are_the_same(make_model) -> None:
    one, other = (
        Decoder(make_model(vocab_size=8), ends).generate(GenerationRequest([[2, 3]], 8, SamplingParams(6), [0]))
        for ends in (1, [1])
    )
    assert one == other


def test_vllm_is_told_every_end() -> None:
    options = request_options(GenerationRequest([], 2, SamplingParams(5), []), 0, (1, 5))
    assert options["stop_token_ids"] == [1, 5]
    assert options["ignore_eos"] is True  # which would be the tokenizer's alone


def test_a_constraint_ends_as_completions_do(chat_tokenizer) -> None:
    prompter = Prompter(chat_tokenizer, "selector")
    written = prompter.completion("[2] > [1]")
    constraint = prompter.constraint(3, 2)
    assert all(token in allowed for token, allowed in zip(written, constraint.allowed_along(written), strict=True))
    assert constraint.allowed(written[:-1]) == (END,)
    assert constraint.allowed(written) == ()


def test_an_export_names_every_end(tmp_path: Path, make_model) -> None:
    """`vllm serve` stops where the run did."""
    tokenizer = build_tokenizer(chat=True)
    prompter = Prompter(tokenizer, "generator", declared_ends=(9,))
    export_role(make_model(), tokenizer, tmp_path / "generator", ends=prompter.ends.stops)
    assert declared_ends(str(tmp_path / "generator")) == prompter.ends.stops == (EOS, END, 9)


def test_a_served_pair_stops_where_its_models_declare(tmp_path: Path, questions) -> None:
    """The quick start with its end renamed and both declared ran on to the longest answer."""
    for role in ("selector", "generator"):
        folder = training_world.save_model(tmp_path / role, 3)
        GenerationConfig(eos_token_id=[1, *range(3, 20)]).save_pretrained(folder)
        (folder / "prompt.jinja").write_text("where in {{ question }}")
    save_settings(tmp_path, PipelineSettings(2, None, 12, 12, {}))
    answers = RAGPipeline.from_pretrained(tmp_path, device="cpu").answer_all(training_world.questions(4))
    assert all(len(answer.text.split()) <= 1 for answer in answers)


# Thinking ---------------------------------------------------------------------------------------------------

SWITCH = "{% if enable_thinking is defined and not enable_thinking %}quiet {% endif %}{{ messages[0]['content'] }}"


def test_thinking_is_off_where_the_template_has_the_switch() -> None:
    assert Prompter(chat(SWITCH), "generator").render("?", []).startswith("quiet ")
    on = Prompter(chat(SWITCH), "generator", None, {"enable_thinking": True})
    assert not on.render("?", []).startswith("quiet ")


def test_a_template_without_the_switch_is_told_nothing() -> None:
    """Some templates look at what they are given."""
    template = "{{ messages[0]['content'] }}{% if enable is defined or enable_thinking_mode is defined %}!{% endif %}"
    assert "!" not in Prompter(chat(template), "generator").render("", [])


def test_thinking_marks_that_are_special_tokens_still_say_what_is_thinking() -> None:
    """Decoding leaves special tokens out, and would leave the thoughts in."""
    tokenizer = build_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["[THINK]", "[/THINK]"]})
    prompter = Prompter(tokenizer, "selector")
    ids = tokenizer("[THINK][3] fits[/THINK][2] > [4]<eos>", add_special_tokens=False)["input_ids"]
    assert prompter.decode(ids) == "[THINK][3] fits[/THINK][2] > [4]"


# Refused ----------------------------------------------------------------------------------------------------


def test_a_template_that_drops_plain_text_is_refused(questions) -> None:
    """It loops over parts of the content. Every prompt was the same eleven tokens, and the run ended with 0."""
    parts = "{% for m in messages %}user {% for part in m.content %}{{ part.text }}{% endfor %}{% endfor %}"
    with pytest.raises(InputError, match=r"chat template of .* leaves a message of plain text out"):
        Prompter(chat(parts), "selector").selector_prompt(questions[0], 2)


@pytest.mark.parametrize("template", ["fixed", "{{ messages[0]['content'][:9] }}", "{{ messages[0]['role'] }}"])
def test_a_template_that_leaves_the_question_out_is_refused(template: str, questions) -> None:
    with pytest.raises(InputError, match="the prompt holds the question"):
        Prompter(chat(template), "generator").generator_prompt(questions[0], (1,))


def test_a_template_that_strips_its_message_is_fine(questions) -> None:
    template = "{{ messages[0]['content'] | trim }}"
    asked = Prompter(chat(template), "generator").render(questions[0].question, questions[0].documents)
    assert questions[0].question in asked


def test_several_templates_without_a_default_are_refused_unless_one_is_named(questions) -> None:
    several = {"rag": "rag " + CHAT_TEMPLATE, "tool_use": CHAT_TEMPLATE}
    with pytest.raises(InputError, match=r"no template is named, .* rag, tool_use.*\{chat_template: rag\}"):
        Prompter(chat(several), "selector")
    named = Prompter(chat(several), "generator", None, {"chat_template": "rag"})
    assert named.render("?", []).startswith("rag ")
    assert Prompter(chat({**several, "default": "{{ messages[0]['content'] }}"}), "generator").render("?", [])


@pytest.mark.parametrize("name", ["tokenize", "add_generation_prompt", "conversation"])
def test_arguments_that_are_not_a_templates_are_refused(name: str) -> None:
    with pytest.raises(InputError, match=f"chat_template_kwargs: '{name}': these are variables"):
        Prompter(chat(CHAT_TEMPLATE), "selector", None, {name: True})


@pytest.mark.parametrize("template", ["{{ raise_exception('no') }}", "{{ messages[9].content }}", "{{ 1 / 0 }}"])
def test_a_template_that_fails_is_refused_in_one_line(template: str, questions) -> None:
    with pytest.raises(InputError, match="chat template of") as error:
        Prompter(chat(template), "selector").selector_prompt(questions[0], 2)
    assert len(str(error.value).splitlines()) == 1


# Control tokens in texts ------------------------------------------------------------------------------------


def with_tokens(*tokens: str | AddedToken, special: bool = True, normalizer=None):
    tokenizer = build_tokenizer()
    if normalizer is not None:
        tokenizer.backend_tokenizer.normalizer = normalizer
    tokenizer.add_tokens([t if isinstance(t, AddedToken) else AddedToken(t) for t in tokens], special_tokens=special)
    return tokenizer


LOWER = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
SPELLINGS = {
    "marked as special": (with_tokens("<stop>"), "a<stop>b"),
    "not marked as special": (with_tokens("<think>", special=False), "a<think>b</think>"),
    "in brackets": (with_tokens("[INST]", special=False), "a[INST]b"),
    "in capitals": (with_tokens(AddedToken("<stop>", normalized=True), normalizer=LOWER), "a<STOP>b"),
    "in full width": (with_tokens(AddedToken("<stop>", normalized=True), normalizer=LOWER), "a＜stop＞b"),
    "of one character": (with_tokens("§"), "a§b"),
    "of one character, in full width": (
        with_tokens(AddedToken("#", normalized=True), normalizer=normalizers.NFKC()),
        "a＃b",
    ),
    "with the space before it": (with_tokens(AddedToken("<stop>", lstrip=True, rstrip=True)), "a  <stop>  b"),
    "within another": (with_tokens("<stop>", "< stop>"), "a<stop>b"),
    "twice": (with_tokens("<stop>"), "<stop><stop>"),
    "put together again by a normalizer": (
        with_tokens(AddedToken("<stop>", normalized=True), normalizer=normalizers.Replace(" ", "")),
        "a<stop>b",
    ),
}


@pytest.mark.parametrize("case", SPELLINGS)
def test_a_text_cannot_spell_a_control_token(case: str) -> None:
    tokenizer, text = SPELLINGS[case]
    added = set(tokenizer.added_tokens_decoder)
    assert added & set(tokenizer(text, add_special_tokens=False)["input_ids"]), "it would have, as it is"
    defused = Defuser(tokenizer).defuse(text)
    assert not added & set(tokenizer(defused, add_special_tokens=False)["input_ids"])
    assert [c for c in defused if c in "ab"] == [c for c in text if c in "ab"]


@pytest.mark.parametrize(
    "text", ["plain", "[3] > [1]", "COVID-19 and a  gap", "<table> of < 3", "as noted [2]", "<eos", "{{ k }}"]
)
def test_other_texts_are_left_alone(text: str) -> None:
    """Words and gaps are added to vocabularies too, and so are the numbers of documents."""
    tokenizer = with_tokens("COVID-19", "  ", "[1]", "[2]", "[3]", special=False)
    assert Defuser(tokenizer).defuse(text) == text


def test_an_unknown_word_is_no_control_token() -> None:
    tokenizer = training_world.tokenizer()
    assert Defuser(tokenizer).defuse("zebra lives in rome") == "zebra lives in rome"
    assert 1 not in tokenizer(Defuser(tokenizer).defuse("ada </s> bo"))["input_ids"]
