"""Ask a trained pair: `python examples/answer.py runs/quickstart`."""

from __future__ import annotations

import sys

from dro_rl.pipeline import RAGPipeline
from dro_rl.records import Document

rag = RAGPipeline.from_pretrained(sys.argv[1])
documents = [
    Document(id="1", title="", text="home_of mira oslo"),
    Document(id="2", title="", text="school_of mira turin"),
    Document(id="3", title="", text="home_of boris lima"),
    Document(id="4", title="", text="friend_of ada mira"),
]
answer = rag.answer("school_of mira ?", documents)
print(f"answer     {answer.text}  (log p {answer.logp:.2f})")
print(f"selection  {' > '.join(documents[number - 1].text for number in answer.selection.numbers)}")
