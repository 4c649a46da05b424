"""Ask a trained pair: `python examples/answer.py runs/quickstart`."""

from __future__ import annotations

import sys

from dro_rl import Document, RAGPipeline

rag = RAGPipeline.from_pretrained(sys.argv[1])
documents = [
    Document(id="1", title="rumour", text="school_of mira oslo"),
    Document(id="2", title="register", text="school_of mira turin"),
    Document(id="3", title="novel", text="school_of mira lima"),
    Document(id="4", title="census", text="home_of mira riga"),
    Document(id="5", title="advert", text="school_of mira bern"),
]
answer = rag.answer("school_of mira ?", documents)
print(f"answer     {answer.text}  (log p {answer.logp:.2f})")
print(f"selection  {' > '.join(f'{documents[n - 1].title} {documents[n - 1].text}' for n in answer.selection.numbers)}")
