"""Made-up rows in the released formats."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

DPR = {
    "dataset": "nq_train_psgs_w100",
    "question": "wer malte es",
    "answers": ["Zoë", "Zoe", "Zoë"],
    "positive_ctxs": [
        {"title": "Bild", "text": "Zoë malte es.", "score": 1000, "title_score": 1, "passage_id": "17"},
        {"title": "Zoë", "text": "Sie malte.", "score": 9.5, "title_score": 0, "passage_id": "4"},
    ],
    "negative_ctxs": [{"title": "Other", "text": "Of another question.", "score": 0, "passage_id": "99"}],
    "hard_negative_ctxs": [
        {"title": "Rahmen", "text": f"Rahmen {n}.", "score": 8.0, "passage_id": str(30 + n)} for n in range(6)
    ],
}
RETRIEVED = {
    "question": "who painted it",
    "answers": ["Zoë"],
    "ctxs": [
        {"id": "wiki:8", "title": "A", "text": "Nobody.", "score": "81.2", "hasanswer": False, "isgold": False},
        {"id": "wiki:9", "title": "B", "text": "Zoë did.", "score": "80.1", "hasanswer": True, "isgold": True},
    ],
}
HOTPOT: dict[str, Any] = {
    "_id": "5a8b57f25542995d1e6f1371",
    "question": "Were both born in Łódź?",
    "answer": "yes",
    "type": "comparison",
    "level": "hard",
    "supporting_facts": [["Ann", 0], ["Bob", 1], ["Ann", 2]],
    "context": [["Carl", ["Carl is a baker."]], ["Ann", ["Ann sings.", " Ann was born in Łódź."]], ["Bob", ["Bob."]]],
}
HOTPOT_COLUMNS = {
    "id": HOTPOT["_id"],
    "question": HOTPOT["question"],
    "answer": "yes",
    "type": "comparison",
    "level": "hard",
    "supporting_facts": {"title": ["Ann", "Bob", "Ann"], "sent_id": [0, 1, 2]},
    "context": {"title": [pair[0] for pair in HOTPOT["context"]], "sentences": [pair[1] for pair in HOTPOT["context"]]},
}
HOTPOT_OBJECTS = HOTPOT_COLUMNS | {
    "supporting_facts": [{"title": title, "sent_id": n} for title, n in HOTPOT["supporting_facts"]],
    "context": [{"title": title, "sentences": sentences} for title, sentences in HOTPOT["context"]],
}
TWO_WIKI: dict[str, Any] = {
    "_id": "8813f87c0bdd11eba7f7acde48001122",
    "type": "compositional",
    "question": "Who is the mother of the director?",
    "context": [["Film", ["It was made by Mia."]], ["Mia", ["Mia's mother", "is Eva."]], ["Mia", ["Another Mia."]]],
    "supporting_facts": [["Film", 0], ["Mia", 1]],
    "evidences": [["Film", "director", "Mia"], ["Mia", "mother", "Eva"]],
    "answer": "Eva",
    "answer_id": "Q12",
}
AS_TEXT = {field: json.dumps(TWO_WIKI[field]) for field in ("context", "supporting_facts", "evidences")}
TWO_WIKI_MIRRORS: dict[str, dict[str, Any]] = {
    "JSON as text": TWO_WIKI | AS_TEXT,
    "Python's spelling": TWO_WIKI | {field: str(TWO_WIKI[field]) for field in AS_TEXT},
    "pairs as text": TWO_WIKI
    | {field: [json.dumps(pair) for pair in TWO_WIKI[field]] for field in ("context", "supporting_facts")},
    "sentences as text": TWO_WIKI | {"context": [[title, json.dumps(said)] for title, said in TWO_WIKI["context"]]},
    "title and sentences as text": TWO_WIKI
    | {
        "context": [[json.dumps(title), json.dumps(said)] for title, said in TWO_WIKI["context"]],
        "supporting_facts": [[json.dumps(title), n] for title, n in TWO_WIKI["supporting_facts"]],
    },
    "columns of text": TWO_WIKI
    | {
        "context": {
            "title": json.dumps([title for title, _ in TWO_WIKI["context"]]),
            "content": json.dumps([said for _, said in TWO_WIKI["context"]]),
        },
        "supporting_facts": json.dumps({"title": ["Film", "Mia"], "sent_id": [0, 0]}),
    },
    "columns of sentences as text": TWO_WIKI
    | {
        "context": {
            "title": [title for title, _ in TWO_WIKI["context"]],
            "sentences": [json.dumps(said) for _, said in TWO_WIKI["context"]],
        },
    },
}
MUSIQUE = {
    "id": "3hop1__13_27_9",
    "paragraphs": [
        {"idx": 0, "title": "Ort", "paragraph_text": "Ein Ort.", "is_supporting": False},
        {"idx": 1, "title": "Fluss", "paragraph_text": "Ein Fluss.", "is_supporting": True},
        {"idx": 2, "title": "Fluss", "paragraph_text": "Noch ein Fluss.", "is_supporting": True},
        {"idx": 3, "title": "Ort", "paragraph_text": "Ein Ort.", "is_supporting": False},
    ],
    "question": "Wo mündet er?",
    "question_decomposition": [{"id": 13, "question": "?", "answer": "x", "paragraph_support_idx": 1}],
    "answer": "Ulm",
    "answer_aliases": ["Ulm an der Donau", "Ulm"],
    "answerable": True,
}
WOW = {
    "chosen_topic": "Tea",
    "persona": "i like tea",
    "wizard_eval": 5,
    "chosen_topic_passage": ["Tea is a drink.", "It is hot."],
    "dialog": [
        {
            "speaker": "0_Wizard",
            "text": "Do you like\ntea?",
            "checked_sentence": {"chosen_topic_0_Tea": "Tea is a drink."},
            "checked_passage": {"chosen_topic_0_Tea": "Tea"},
            "retrieved_passages": [{"Cup": ["A cup holds tea."]}],
            "retrieved_topics": ["Cup"],
        },
        {
            "speaker": "1_Apprentice",
            "text": "I do! Green tea.",
            "retrieved_passages": [{"Green tea": ["Green tea is green.", "It is old."]}, {"Tea": ["Tea is a drink."]}],
            "retrieved_topics": ["Green tea", "Tea"],
        },
        {
            "speaker": "0_Wizard",
            "text": "It is very old.",
            "checked_sentence": {"partner_Green_tea_1": "It is old."},
            "checked_passage": {"partner_Green_tea_1": "Green tea"},
            "retrieved_passages": [],
            "retrieved_topics": [],
        },
        {"speaker": "1_Apprentice", "text": "Bye.", "retrieved_passages": []},
        {
            "speaker": "0_Wizard",
            "text": "Bye!",
            "checked_sentence": {"no_passages_used": "no_passages_used"},
            "checked_passage": {"no_passages_used": "no_passages_used"},
            "retrieved_passages": [],
        },
    ],
}
KILT = {
    "id": "-1000",
    "input": "first\nsecond",
    "output": [
        {"answer": "Ulm", "provenance": [{"wikipedia_id": "5", "title": "Ulm", "start_paragraph_id": 1}]},
        {"provenance": [{"wikipedia_id": "6", "title": "Donau"}]},
        {"answer": "Ulm"},
        {"answer": "Ulm, Germany"},
    ],
    "meta": {"left_context": ""},
}
FLASHRAG = {"id": "dev_3", "question": "who?", "golden_answers": ["Ann", "Anna"], "metadata": {}}
FLASHRAG_CONTEXT = {
    "id": "dev_4",
    "question": "who?",
    "golden_answers": ["Ann"],
    "metadata": {
        "type": "bridge",
        "supporting_facts": {"title": ["Ann"], "sent_id": [0]},
        "context": {"title": ["Bob", "Ann"], "content": [["Bob is."], ["Ann is.", "She sings."]]},
    },
}
SEARCH_R1 = {
    "id": "train_0",
    "question": "who sings?",
    "golden_answers": ["Ann"],
    "data_source": "nq",
    "prompt": [{"role": "user", "content": "Answer it. Question: who sings?\n"}],
    "ability": "fact-reasoning",
    "reward_model": {"style": "rule", "ground_truth": {"target": ["Ann"]}},
    "extra_info": {"index": 0, "split": "train"},
}
RANK_LLM = {
    "query": {"text": "who sings?", "qid": 7},
    "candidates": [
        {"docid": "a", "score": 9.0, "doc": {"contents": '"Ann"\nAnn sings.'}},
        {"docid": 12, "score": 8.0, "doc": {"title": "Bob", "text": "Bob does not."}},
    ],
}
FIRST = {
    "question": "who sings?",
    "answer": "Ann",
    "positive": ["Title: Ann. Content: Ann sings.", "Title: Dr. Bob . Content: Bob hums."],
    "retrieval": ['Title: "Carl" Text: Carl is deaf.', 'Title: "Ann" Text: Ann sings.', "Nobody knows."],
    "query_id": "loop_0###nq###",
}


def write(path: Path, *rows: Any) -> Path:
    """Rows in the container that the name says."""
    name = path.name.removesuffix(".gz")
    if name.endswith(".parquet"):
        pq.write_table(pa.Table.from_pylist(list(rows)), path)
        return path
    text = json.dumps(rows) if name.endswith(".json") else "\r\n".join(json.dumps(row) for row in rows)
    data = text.encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path
