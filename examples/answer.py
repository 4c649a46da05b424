"""Ask a trained pair: `python examples/answer.py runs/quickstart`."""

from __future__ import annotations

import sys

from dro_rl import Document, RAGPipeline

SAID = """
rumour school_of mira oslo
advert friend_of hugo nils
register school_of mira turin
novel school_of mira lima
census home_of mira riga
diary boss_of carla ugo
advert school_of mira bonn
register office_of lena kyoto
novel birthplace_of mira quito
diary school_of mira cairo
rumour teacher_of otto vera
census school_of sven delhi
"""

rag = RAGPipeline.from_pretrained(sys.argv[1])
lines = [line.split(maxsplit=1) for line in SAID.strip().splitlines()]
documents = [Document(id=str(n), title=source, text=text) for n, (source, text) in enumerate(lines, start=1)]
answer = rag.answer("school_of mira ?", documents)
print(f"answer     {answer.text}  (log p {answer.logp:.2f})")
print(f"selection  {' > '.join(f'{documents[n - 1].title} {documents[n - 1].text}' for n in answer.selection.numbers)}")
