"""The pair at work on a batch of questions: candidates found where none came along, selected, answered. One thread."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dro_rl.pipeline import Answer, PipelineSettings, RAGPipeline, read
from dro_rl.records import Document, Question, Selection
from dro_rl.retrieval.index import Index, check_k, read_index_manifest


@dataclass(frozen=True, slots=True)
class Asked:
    """A question.

    Args:
        question: the text.
        documents: to select from; none where they are to be found in the index.
        answered: whether the generator answers; else documents are selected and no more.
        most_tokens: of the answer; None for as many as the pair was trained to write.
    """

    question: str
    documents: tuple[Document, ...]
    answered: bool = False
    most_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class Served:
    """What became of it.

    Args:
        documents: the candidates; none where the index has nothing for the question.
        scores: the retriever's, where the candidates were found here.
        selection: what the selector said.
        numbers: the documents that the generator reads, from 1: the first candidates where none was selected.
        text: the answer; empty where none was asked for.
        cut: whether the answer was longer than it may be.
        prompt_tokens: of the generator's prompt; where it was not asked, of the question and all documents, whole.
        completion_tokens: of the answer, its end included where it came to it.
    """

    documents: tuple[Document, ...]
    scores: tuple[float, ...] | None
    selection: Selection
    numbers: tuple[int, ...]
    text: str = ""
    cut: bool = False
    prompt_tokens: int = 0
    completion_tokens: int = 0


class Pair:
    """A trained pair, with an index to find candidates in or without one.

    Args:
        pipeline: the pair.
        index: where candidates are found.
        candidates: how many of them.
    """

    def __init__(self, pipeline: RAGPipeline, index: Index | None = None, candidates: int = 20) -> None:
        self.pipeline, self.index, self.candidates = pipeline, index, candidates

    @classmethod
    def open(cls, run: Path, settings: PipelineSettings, index: Path | None, candidates: int, batch_size: int) -> Pair:
        """Load what a run left behind, and an index.

        Args:
            run: the run's `output_dir`.
            settings: lengths, K and windows.
            index: what `dro-rl index` filled; None without one.
            candidates: how many documents are found there.
            batch_size: questions answered at once.

        Raises:
            InputError: one of the folders is not what it should be.
        """
        if index is not None:
            check_k(candidates, read_index_manifest(index), index)
        pipeline = RAGPipeline.from_pretrained(run, settings=settings, batch_size=batch_size)
        return cls(pipeline, None if index is None else Index(index), candidates)

    def work(self, batch: Sequence[Asked]) -> list[Served]:
        """What becomes of each question; those that want the same go through a model together.

        Raises:
            InputError: a prompt does not fit, or the generator's endpoint fails.
        """
        candidates = self._candidates(batch)
        asks = [place for place, (documents, _) in enumerate(candidates) if documents]
        questions = [Question("asked", batch[place].question, (), candidates[place][0]) for place in asks]
        selections = self.pipeline.select_all(questions) if questions else []
        answered = [number for number, place in enumerate(asks) if batch[place].answered]
        answers: dict[int, Answer] = {}
        if answered:
            written = self.pipeline.answer_all(
                [questions[number] for number in answered], [selections[number] for number in answered]
            )
            answers = dict(zip(answered, written, strict=True))
        served = [Served((), scores, Selection((), valid=False), ()) for _, scores in candidates]
        for number, place in enumerate(asks):
            served[place] = self._served(
                batch[place], candidates[place][1], questions[number], selections[number], answers.get(number)
            )
        return served

    def _candidates(self, batch: Sequence[Asked]) -> list[tuple[tuple[Document, ...], tuple[float, ...] | None]]:
        """Each question's documents, with the retriever's scores where they come from the index."""
        found: list[tuple[tuple[Document, ...], tuple[float, ...] | None]]
        found = [(asked.documents, None) for asked in batch]
        without = [place for place, asked in enumerate(batch) if not asked.documents]
        if without and self.index is not None:
            hits = self.index.search([batch[place].question for place in without], self.candidates)
            for place, each in zip(without, hits, strict=True):
                found[place] = (tuple(hit.document for hit in each), tuple(hit.score for hit in each))
        return found

    def _served(
        self,
        asked: Asked,
        scores: tuple[float, ...] | None,
        question: Question,
        selection: Selection,
        answer: Answer | None,
    ) -> Served:
        numbers = read(selection, question, self.pipeline.settings.spec.most)
        if answer is None:
            texts = [question.question, *(text for each in question.documents for text in (each.title, each.text))]
            tokens = self.pipeline.prompters["selector"].tokenizer(texts, add_special_tokens=False)["input_ids"]
            return Served(question.documents, scores, selection, numbers, prompt_tokens=sum(map(len, tokens)))
        prompter = self.pipeline.prompters["generator"]
        prompt, text = prompter.generator_prompt(question, numbers), answer.text
        ids = prompter.tokenizer(text, add_special_tokens=False)["input_ids"]
        longest = self.pipeline.settings.max_answer_length
        cut, count = len(ids) >= longest, min(len(ids) + 1, longest)
        if asked.most_tokens is not None and count > asked.most_tokens:
            # Greedy decoding that stops sooner writes the same first tokens.
            cut, count = True, asked.most_tokens
            text = str(prompter.tokenizer.decode(ids[:count])) if len(ids) > count else text
        return Served(question.documents, scores, selection, numbers, text, cut, len(prompt.ids), count)
