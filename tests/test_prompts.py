"""Claims about prompts: one template, one tokenisation and one way to cut, whoever asks."""

from __future__ import annotations

from dataclasses import replace

import pytest
from tokenizers.processors import TemplateProcessing

from dro_rl.config import DROConfig
from dro_rl.em.e_step import Asked, EStep
from dro_rl.em.m_step import Group, MicroBatch
from dro_rl.em.method import Method
from dro_rl.errors import InputError
from dro_rl.evaluation.evaluator import evaluate
from dro_rl.job.examples import generator_examples, selector_examples
from dro_rl.pipeline import PipelineSettings, RAGPipeline
from dro_rl.prompts import Prompter, load_template
from dro_rl.proposal import Completion
from dro_rl.recipe import RunConfig
from dro_rl.records import Document, Question
from dro_rl.roles import ROLES
from dro_rl.selection import format_selection

BOTH_KINDS = pytest.mark.parametrize("kind", ["tokenizer", "chat_tokenizer"])
K = 2


@pytest.fixture
def prompters(tokenizer) -> dict[str, Prompter]:
    return {role: Prompter(tokenizer, role) for role in ("selector", "generator")}


# What a prompt says -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("template", ["selector", "generator", "toy_selector", "toy_generator"])
def test_documents_are_numbered_from_one_in_their_order_with_their_titles(tokenizer, questions, template) -> None:
    """Defect A2 of the first implementation: numbered when sampling, not numbered when training."""
    question = questions[0]
    text = Prompter(tokenizer, template).render(question.question, question.documents, k=K, example="[2] > [1]")
    at = [text.index(f"[{n}] {d.title}".strip()) for n, d in enumerate(question.documents, start=1)]
    assert at == sorted(at)
    for n, document in enumerate(question.documents, start=1):
        line = next(line for line in text.splitlines() if line.startswith(f"[{n}]"))
        assert line.endswith(document.text)
        assert document.title in line
    assert "[5]" not in text
    assert question.question in text


def test_a_document_without_title_has_no_stray_punctuation(prompters, questions) -> None:
    text = prompters["generator"].render(questions[0].question, questions[0].documents)
    assert "[4] Birds fly at night." in text
    assert "[1] Owls: An owl has no lamp." in text


@pytest.mark.parametrize("k", [1, 2, 4])
def test_the_selector_is_asked_for_exactly_k_in_the_selection_format(prompters, questions, k: int) -> None:
    """The first implementation asks to rank all, and wants five."""
    text = prompters["selector"].decode(prompters["selector"].selector_prompt(questions[0], k).ids)
    assert f"exactly {k} of the 4 documents" in text
    assert format_selection(range(k, 0, -1)) in text


def test_the_generator_reads_the_selected_documents_in_the_selected_order(prompters, questions) -> None:
    text = prompters["generator"].decode(prompters["generator"].generator_prompt(questions[0], (3, 1)).ids)
    assert text.index("[1] Lamps") < text.index("[2] Owls")
    assert "Herons" not in text


def test_text_that_looks_like_a_template_is_text(prompters, questions) -> None:
    odd = replace(questions[0], question="{{ k }} {% endfor %} <b>&amp;</b>?")
    assert odd.question in prompters["selector"].decode(prompters["selector"].selector_prompt(odd, K).ids)


def test_a_custom_template_is_a_file(tokenizer, questions, tmp_path) -> None:
    path = tmp_path / "mine.jinja"
    path.write_text("{{ question }} / {{ documents | length }} / {{ k }}")
    prompter = Prompter(tokenizer, str(path))
    assert prompter.decode(prompter.selector_prompt(questions[0], 3).ids) == f"{questions[0].question} / 4 / 3"
    assert prompter.source == path.read_text()


# Chat templates ---------------------------------------------------------------------------------------------


def test_the_chat_template_is_used_where_there_is_one(tokenizer, chat_tokenizer, questions) -> None:
    """Defect A7: sampled raw, scored and trained through the chat template."""
    plain = tokenizer.decode(Prompter(tokenizer, "selector").selector_prompt(questions[0], K).ids)
    chat = chat_tokenizer.decode(Prompter(chat_tokenizer, "selector").selector_prompt(questions[0], K).ids)
    assert "<|start|>" not in plain
    assert chat == f"<|start|>user\n{plain.rstrip()}<|end|>\n<|start|>assistant\n"


def test_the_assistant_header_is_in_the_prompt_and_never_in_the_completion(chat_tokenizer, questions) -> None:
    """Defect A8: a mask built without the generation prompt, header tokens enter loss and likelihood."""
    prompter = Prompter(chat_tokenizer, "generator")
    prompt = prompter.generator_prompt(questions[0], (2, 1)).ids
    header = tuple(chat_tokenizer("<|start|>assistant\n")["input_ids"])
    assert prompt[-len(header) :] == header
    completion = prompter.completion("heron")
    assert chat_tokenizer.decode(completion) == "heron<|end|>"
    assert not set(header[:1]) & set(completion)


def test_chat_template_arguments_reach_the_template(chat_tokenizer, questions) -> None:
    copy = type(chat_tokenizer)(tokenizer_object=chat_tokenizer._tokenizer, eos_token="<eos>")
    copy.chat_template = "{% if quiet %}quiet {% endif %}{{ messages[0]['content'] }}"
    loud, quiet = Prompter(copy, "generator"), Prompter(copy, "generator", None, {"quiet": True})
    assert quiet.render("?", []) == "quiet " + loud.render("?", [])


@BOTH_KINDS
def test_special_tokens_are_written_once(kind: str, request, questions) -> None:
    """A chat template writes its own beginning of sequence; plain text gets the tokenizer's, and no end."""
    base = request.getfixturevalue(kind)
    marked = type(base)(tokenizer_object=base._tokenizer, bos_token="<pad>", eos_token="<eos>")
    marked._tokenizer.post_processor = TemplateProcessing(
        single="<pad> $A <eos>", special_tokens=[("<pad>", 0), ("<eos>", 1)]
    )
    if base.chat_template:
        marked.chat_template = "<pad>" + base.chat_template
    prompter = Prompter(marked, "generator")
    ids = prompter.generator_prompt(questions[0], (1,)).ids
    assert ids.count(0) == 1
    assert ids[0] == 0
    assert 1 not in ids
    assert prompter.completion("x").count(prompter.eos_token_id) == 1
    assert 0 not in prompter.completion("x")


@BOTH_KINDS
@pytest.mark.parametrize("where", ["title", "text", "question"])
def test_a_text_cannot_write_a_special_token(kind: str, where: str, request, questions) -> None:
    """A document that holds the spelling of an end of sequence must not end the prompt, nor open a turn."""
    base = request.getfixturevalue(kind)
    prompter, eos = Prompter(base, "generator"), base.eos_token
    question, document = questions[0], questions[0].documents[0]
    if where == "question":
        question = replace(question, question=f"{question.question} {eos}now")
    else:
        document = replace(document, **{where: f"before{eos}after"})
    question = replace(question, documents=(document, *question.documents[1:]))
    clean = prompter.generator_prompt(questions[0], (1,)).ids
    spoiled = prompter.generator_prompt(question, (1,)).ids
    assert spoiled != clean
    assert spoiled.count(base.eos_token_id) == clean.count(base.eos_token_id)
    assert base.eos_token_id in base(f"before{eos}after")["input_ids"], "it would have, written as it is"
    assert set(prompter.completion(f"x{eos}y")) & {base.eos_token_id, *prompter.ends.stops} == {prompter.ends.written}


# Completions ------------------------------------------------------------------------------------------------


@BOTH_KINDS
def test_a_completion_is_the_text_and_the_end_of_the_sequence(kind: str, request) -> None:
    prompter = Prompter(request.getfixturevalue(kind), "selector")
    ids = prompter.completion("[3] > [1]")
    assert ids[-1] == prompter.eos_token_id
    assert ids.count(prompter.eos_token_id) == 1
    assert prompter.decode(ids) == "[3] > [1]"


# Cutting ----------------------------------------------------------------------------------------------------


def long_question(*lengths: int) -> Question:
    """Documents of so many short words each, no two alike."""
    documents = tuple(
        Document(f"d{n}", f"Title{n}", " ".join(f"w{n}x{i}" for i in range(length)))
        for n, length in enumerate(lengths, start=1)
    )
    return Question("long", "What stands at the very end of this question?", ("x",), documents)


def pieces(prompter: Prompter, question: Question, ids: tuple[int, ...]) -> list[int]:
    """Words that are left of each document."""
    text = prompter.decode(ids)
    return [text.count(f"w{n}x") for n in range(1, len(question.documents) + 1)]


def test_a_prompt_that_fits_is_not_touched(tokenizer) -> None:
    question = long_question(10, 20, 30)
    whole = Prompter(tokenizer, "selector").selector_prompt(question, K)
    fitting = Prompter(tokenizer, "selector", len(whole.ids)).selector_prompt(question, K)
    assert fitting == whole
    assert not whole.cut


@BOTH_KINDS
@pytest.mark.parametrize("spare", [1, 50, 150, 400])
def test_a_prompt_that_is_too_long_has_its_documents_cut_to_fit(kind: str, spare: int, request) -> None:
    """And nothing else: the question, the titles and the instruction stand whole."""
    question = long_question(60, 60, 60)
    base = request.getfixturevalue(kind)
    whole = Prompter(base, "selector").selector_prompt(question, K)
    prompter = Prompter(base, "selector", len(whole.ids) - spare)
    prompt = prompter.selector_prompt(question, K)
    assert prompt.cut
    assert len(whole.ids) - spare - 9 <= len(prompt.ids) <= len(whole.ids) - spare
    text = prompter.decode(prompt.ids)
    assert text.count(question.question) == 2
    assert all(f"[{n}] Title{n}:" in text for n in (1, 2, 3))
    assert f"exactly {K} of the 3 documents" in text


def test_documents_are_cut_evenly_the_longest_first(tokenizer) -> None:
    question = long_question(5, 60, 60, 60)
    whole = Prompter(tokenizer, "selector").selector_prompt(question, K)
    prompter = Prompter(tokenizer, "selector", len(whole.ids) - 300)
    left = pieces(prompter, question, prompter.selector_prompt(question, K).ids)
    assert left[0] == 5
    assert max(left[1:]) - min(left[1:]) <= 1
    assert 5 < min(left[1:]) < 60


def test_a_cut_document_is_the_beginning_of_the_whole_one(tokenizer) -> None:
    question = long_question(40, 40)
    whole = Prompter(tokenizer, "generator").generator_prompt(question, (1, 2))
    prompter = Prompter(tokenizer, "generator", len(whole.ids) - 100)
    lines = prompter.decode(prompter.generator_prompt(question, (1, 2)).ids).splitlines()
    kept = next(line for line in lines if line.startswith("[1]")).removeprefix("[1] Title1: ")
    assert kept
    assert question.documents[0].text.startswith(kept)


def test_every_length_down_to_the_smallest_is_met(tokenizer) -> None:
    question = long_question(12, 3, 7)
    bare = replace(question, documents=tuple(replace(d, text="") for d in question.documents))
    least = len(Prompter(tokenizer, "generator").generator_prompt(bare, (1, 2, 3)).ids)
    most = len(Prompter(tokenizer, "generator").generator_prompt(question, (1, 2, 3)).ids)
    assert most - least > 50
    for limit in range(least, most):
        prompt = Prompter(tokenizer, "generator", limit).generator_prompt(question, (1, 2, 3))
        assert prompt.cut
        assert len(prompt.ids) <= limit


def test_a_question_that_cannot_fit_is_an_error_that_names_it(tokenizer) -> None:
    prompter = Prompter(tokenizer, "selector", 30)
    with pytest.raises(InputError, match=r"question long: .*max_prompt_length = 30 .*never cut.*Raise"):
        prompter.selector_prompt(long_question(10, 10), K)


# Errors in templates ----------------------------------------------------------------------------------------


NUMBERED = "{% for d in documents %}[{{ loop.index }}] {{ d.text }} [{{ loop.index }}]\n{% endfor %}"


@pytest.mark.parametrize(
    ("template", "again"),
    [
        (
            f"{{{{ question }}}}\n\n{NUMBERED}\nAsked: {{{{ question }}}} !\n\nName {{{{ k }}}}.\nPick:",
            "Asked: why? !\n\nName 1.\nPick:",
        ),
        (f"{NUMBERED}{{{{ question }}}}", "why?"),
        (f"Q: {{{{ question }}}}\n{NUMBERED}\nPick {{{{ k }}}}:", "Question: why?\nPick 1:"),
        (f"{{{{ question }}}}\n{NUMBERED}", "Question: why?"),
    ],
    ids=["behind too", "behind", "before", "before, and nothing behind"],
)  # fmt: skip
def test_a_next_turn_asks_as_the_prompt_ends(tokenizer, tmp_path, template: str, again: str) -> None:
    (tmp_path / "s.jinja").write_text(template)
    documents = tuple(Document(f"d{n}", "", f"text {n}\nwhy? because") for n in range(3))
    prompter = Prompter(tokenizer, str(tmp_path / "s.jinja"))
    assert prompter.selector_asks_again(Question("q", "why?", ("x",), documents), 1) == again


def test_a_missing_template_is_an_error_that_lists_the_shipped_ones() -> None:
    with pytest.raises(
        InputError,
        match=r"'slector': a template is one of dialogue_generator, .* selector,.*Check the name",
    ):
        load_template("slector")


def test_a_template_that_is_not_jinja_is_an_error_with_its_line(tmp_path) -> None:
    path = tmp_path / "bad.jinja"
    path.write_text("fine\n{% for x in %}\n")
    with pytest.raises(InputError, match=r"bad\.jinja: line 2"):
        load_template(str(path))


# One code path ----------------------------------------------------------------------------------------------


class Recorder:
    """Stands for an engine and a model: remembers the prompts, and writes one selection."""

    def __init__(self, completion: tuple[int, ...]) -> None:
        self.completion = completion
        self.prompts: list[tuple[int, ...]] = []

    def at(self, step: int):
        return self

    def generate(self, request):
        self.prompts += [tuple(prompt) for prompt in request.prompts]
        group = [Completion(self.completion, (-0.5,) * len(self.completion))] * request.num_generations
        return [group for _ in request.prompts]

    def samples_policy(self, sampling) -> bool:
        return True

    def __enter__(self):
        return self

    def __exit__(self, *error) -> None:
        pass


@pytest.fixture
def seen(monkeypatch) -> list[tuple[int, ...]]:
    """What answers are scored after, in order; models are stubbed away."""
    import torch

    from dro_rl import pipeline
    from dro_rl.engines import answers

    seen: list[tuple[int, ...]] = []

    def score_rows(model, rows, *options):
        seen.extend(tuple(row.prompt) for row in rows)
        return [[torch.full((len(c),), -1.0) for c in row.completions] for row in rows]

    monkeypatch.setattr(answers, "score_rows", score_rows)
    for module in (answers, pipeline):
        monkeypatch.setattr(module, "Decoder", lambda model, eos, batch_size, shared_prefix: model)
    return seen


@BOTH_KINDS
def test_sampling_scoring_training_evaluation_and_warm_up_ask_with_the_same_tokens(
    kind: str, request, questions, seen, tmp_path
) -> None:
    """Defects A2 and A7: one prompt to sample from, another to train on. Cut alike, too."""
    base = request.getfixturevalue(kind)
    whole = {
        "selector": Prompter(base, "selector").selector_prompt(questions[0], K),
        "generator": Prompter(base, "generator").generator_prompt(questions[0], (1, 2)),
    }
    prompters = {role: Prompter(base, role, len(prompt.ids) - 10) for role, prompt in whole.items()}
    config = DROConfig(output_dir=str(tmp_path), num_generations=2, num_selected=K, report_to="none")
    run = RunConfig(warmup_selector_order="retriever", warmup_generator_documents="retrieved")
    assert prompters["selector"].selector_prompt(questions[0], K).cut
    assert prompters["generator"].generator_prompt(questions[0], (1, 2)).cut
    expected_selector = [prompters["selector"].selector_prompt(question, K).ids for question in questions]
    expected_generator = [prompters["generator"].generator_prompt(question, (1, 2)).ids for question in questions]

    written = prompters["selector"].completion("[1] > [2]")
    engine, writer = Recorder(written), Recorder(written)
    method, asked = Method.of(config), Asked(range(4), questions, range(4), 1.0)
    e_step = EStep(engine, lambda role: engine, None, prompters, method)
    rollouts = e_step.weigh(asked, e_step.sample(asked, 0))
    assert seen == expected_generator
    seen.clear()
    groups = [Group(rollouts[2 * i : 2 * i + 2], (0, 1), questions[i], prompters, method, ROLES) for i in range(4)]
    trained = MicroBatch(groups, method, ROLES, on_policy=True, unmoved=False, eos_token_id=base.eos_token_id)
    pipeline = RAGPipeline(lambda role: writer, prompters, PipelineSettings(K, 900, 16, 16, {}))
    evaluate(pipeline, questions)

    assert engine.prompts == expected_selector
    assert [tuple(row.prompt) for row in trained.rows("selector")] == expected_selector
    assert [prompt for prompt, _ in selector_examples(questions, prompters["selector"], run, config)] == (
        expected_selector
    )
    assert writer.prompts == expected_selector + expected_generator
    assert seen == expected_generator  # in evaluation
    assert [tuple(row.prompt) for row in trained.rows("generator")] == expected_generator
    assert [prompt for prompt, _ in generator_examples(questions, prompters["generator"], run, config)] == (
        expected_generator
    )
