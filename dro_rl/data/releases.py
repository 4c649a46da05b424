"""Where a hub has the five datasets: repository, commit, files, and the sha256 of each.

The commits and hashes are those that public repositories which use these files state, most of them several, and that
the hub's own pages show for Wizard of Wikipedia. docs/data.md says which. A hash that were wrong would end a fetch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Release:
    """A dataset on a hub.

    Args:
        repository: its name there.
        commit: the commit that is pinned, 40 hexadecimal digits.
        format: how its files are read, a name in `dro_rl.data.readers.FORMATS`.
        files: of each split, its files with their sha256 at that commit, in order.
        candidates: whether questions come with documents; else they are to be retrieved.
    """

    repository: str
    commit: str
    format: str
    files: Mapping[str, Mapping[str, str]]
    candidates: bool = True


RELEASES: Mapping[str, Release] = {
    "nq": Release(
        "google-research-datasets/nq_open",
        "5dd9790a83002ad084ddeb7c420dc716852c6f28",
        "nq-open",
        {
            "train": {
                "nq_open/train-00000-of-00001.parquet": (
                    "25d3a544324f900b31ebc05a3a5686bdd5b9b42738133500675c3f20eee7d83a"
                )
            },
            "dev": {
                "nq_open/validation-00000-of-00001.parquet": (
                    "b074bed0bccb56fa1551a8ac1c9c51ce89bc11c7fbb6a9c713b2c33a98531e12"
                )
            },
        },
        candidates=False,
    ),
    "hotpotqa": Release(
        "hotpotqa/hotpot_qa",
        "1908d6afbbead072334abe2965f91bd2709910ab",
        "hotpotqa",
        {
            "train": {
                "distractor/train-00000-of-00002.parquet": (
                    "76d3bb3048a7cc73c1958107c0c5872a00d7e7d00c105b81e92f6769e7822e68"
                ),
                "distractor/train-00001-of-00002.parquet": (
                    "713661628434fbb19fff7392e2e321e4ed107e3c7c7784d0690946e5f722763f"
                ),
            },
            "dev": {
                "distractor/validation-00000-of-00001.parquet": (
                    "c20b638ca82b21d04fe12e14ff417ad05153d4d215a65de54497fca4e972f7c6"
                )
            },
        },
    ),
    "musique": Release(
        "dgslibisey/MuSiQue",
        "c8f4f8c9465fb69d31a8eae894c3fd509c4ca321",
        "musique",
        {
            "train": {
                "musique_ans_v1.0_train.jsonl": "83a75b1e11e4e9bb8f8308e72ac40ca617ae4431b3a0d955b61cab259248490a"
            },
            "dev": {"musique_ans_v1.0_dev.jsonl": "15fa63794d18a94ce12411aca6e2327e65b6e83b0b1490efab3f1962e48abf3b"},
        },
    ),
    "2wikimultihopqa": Release(
        "xanhho/2WikiMultihopQA",
        "612bc5039a457880d9e7d84c3b0a4cf154b70e4f",
        "2wikimultihopqa",
        {
            "train": {"train.parquet": "a0f464f1604edf40ad990b605c61c03d56911c106d09ad32becf6afcf3201d52"},
            "dev": {"dev.parquet": "c0d8b60b9026b728fb07ad74c5252a0f188f6942e8ba5c02df4dfa369502ea8d"},
        },
    ),
    "wow": Release(
        "RUC-NLPIR/FlashRAG_datasets",
        "98c7682b2a176d805daf040e53bbb391b0e15c83",
        "flashrag",
        {
            "train": {"wow/train.jsonl": "f604502aa3670fcb0bfef25876ffe3ed678ad9e741a1a681ea08b079008298ef"},
            "dev": {"wow/dev.jsonl": "6dfe63606b5e94418ed5e18762fb87605a55455029a0aba2afe607b9ef86aa77"},
        },
        candidates=False,
    ),
}
"""By the name of the dataset."""
