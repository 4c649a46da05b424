"""Keys of a run beside training: data, models, warm-up."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from dro_rl.errors import InputError, Phrase
from dro_rl.keys import Rule, above, at_least, check_keys, either, option, within
from dro_rl.roles import Role
from dro_rl.toy.world import TOY_BASE

SHARES = Rule(
    "two shares, [low, high] with 0 <= low <= high <= 1",
    "Use [0.1, 0.9], or leave it unset.",
    lambda value: len(value) == 2 and 0 <= float(value[0]) <= float(value[1]) <= 1,
)


@dataclass(frozen=True, slots=True)
class RoleSettings:
    """What a recipe says of one role.

    Args:
        model: where it comes from: a folder or a hub name.
        revision: of the hub.
        prompt_template: a shipped template's name or a file.
        lora_r: rank of its adapters, 0 for none.
        warms: whether it is warmed up.
        warmup_steps, warmup_learning_rate: how.
    """

    model: str
    revision: str | None
    prompt_template: str
    lora_r: int
    warms: bool
    warmup_steps: int
    warmup_learning_rate: float


@dataclass
class RunConfig:
    """Data, models and warm-up: what `DROTrainer` is given."""

    dataset_name: str = option(
        "", "Questions: a file, a folder with a file for each split, a hub name, or toy.", group="Data"
    )
    dataset_config: str | None = option(
        None,
        "Configuration of a hub dataset, a dataset of a folder that holds several, or how many candidates toy has.",
    )
    dataset_columns: dict[str, Any] = option(
        {}, "Columns of the data by the fields they are, where they have other names: {question: query, id: qid}."
    )
    dataset_train_split: str = option("train", "Split to train on: a hub split, or a file's stem in a folder.")
    dataset_eval_split: str = option("dev", "Split to evaluate on: early stopping looks at it, so never report it.")
    eval_dataset_name: str | None = option(
        None, "Where the dev split is, when dataset_name is a single file with no dev file beside it."
    )
    max_train_samples: int | None = option(None, "Use the first so many training questions.", at_least(1))
    max_eval_samples: int | None = option(None, "Use the first so many dev questions.", at_least(1))
    solvable: list[float] | None = option(
        None,
        "Train on the questions that such a share of the first models' rollouts answer exactly, from the first to the "
        "second of two numbers: [0.1, 0.9]; unset: on all.",
        SHARES,
    )

    num_documents: int | None = option(
        None, "Cut each question's candidates to the first so many; unset: all.", at_least(1), group="Candidates"
    )
    keep_gold: bool = option(
        False, "When cutting, keep labelled documents of training questions in place of the last others. Never of dev."
    )
    shuffle_documents: bool = option(False, "Shuffle each question's candidates, by the seed and the question's id.")

    selector_model_name_or_path: str = option(
        "", "The selector: a folder or a hub name, or toy for the shipped one.", group="Models"
    )
    generator_model_name_or_path: str = option("", "The generator: a folder or a hub name, or toy.")
    selector_model_revision: str | None = option(None, "Hub revision of the selector.")
    generator_model_revision: str | None = option(None, "Hub revision of the generator.")
    selector_prompt_template: str = option(
        "selector", "The selector's prompt: a shipped template's name or a .jinja file."
    )
    generator_prompt_template: str = option("generator", "The generator's prompt: a shipped template's name or a file.")
    chat_template_kwargs: dict[str, Any] = option({}, "Passed to chat templates, such as {enable_thinking: false}.")
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = option(
        "float32", "Type the weights are held in; bf16: true computes in bfloat16 over float32 weights."
    )
    attn_implementation: str | None = option(None, "Attention: sdpa, eager, flash_attention_2, …")
    trust_remote_code: bool = option(False, "Run code that comes with a model. Only for models you trust.")
    selector_lora_r: int = option(
        0, "Rank of the selector's adapters; 0 trains all weights.", within("[0, 65536]", "Use 16, or 0 for none.")
    )
    generator_lora_r: int = option(
        0, "Rank of the generator's adapters; 0 trains all weights.", within("[0, 65536]", "Use 16, or 0 for none.")
    )
    lora_alpha: int = option(32, "Scale of the adapters.", within("[0, 65536]", "Use 32."))
    lora_dropout: float = option(0.0, "Dropout of the adapters.", within("[0, 1)", "Use 0.05, or 0 for none."))
    lora_target_modules: list[str] | None = option(
        None, "Layers with adapters; unset: every linear layer but the head."
    )
    quantization: Literal["none", "nf4", "int8"] = option(
        "none",
        "How the frozen weights under adapters are held: in four bits or eight, by bitsandbytes, or as they are.",
    )
    share_base: bool = option(
        False, "Hold the frozen weights under both roles' adapters once. Both roles name the same model."
    )

    warmup: Literal["none", "selector", "generator", "both"] = option(
        "none",
        "Supervised training before the first iteration, kept in a cache by the hash of what it depends on.",
        group="Warm-up",
    )
    warmup_selector_order: Literal["labels", "ranking", "retriever", "random", "quotes"] = option(
        "labels",
        "What the selector imitates: labelled documents first, a given ranking, the retriever's order, or chance. "
        "quotes: it learns to name the documents that words are quoted from, which needs no labels.",
    )
    warmup_selector_ranking: str | None = option(
        None, "For warmup_selector_order: ranking. JSONL with {id, ranking: [document ids]}."
    )
    warmup_generator_documents: Literal["gold", "retrieved", "mixed", "random"] = option(
        "mixed",
        "What the generator reads: labelled documents, the retriever's first K, labelled among others, or chance.",
    )
    warmup_selector_steps: int = option(
        -1, "Optimizer steps of the selector's warm-up.", either(-1, at_least(1), "one epoch")
    )
    warmup_generator_steps: int = option(
        -1, "Optimizer steps of the generator's warm-up.", either(-1, at_least(1), "one epoch")
    )
    warmup_selector_learning_rate: float = option(
        1e-5, "Learning rate of the selector's warm-up.", above(0, "Use a positive rate, or warmup: none.")
    )
    warmup_generator_learning_rate: float = option(
        1e-5, "Learning rate of the generator's warm-up.", above(0, "Use a positive rate, or warmup: none.")
    )
    warmup_batch_size: int = option(8, "Questions a device and pass of the warm-up.", at_least(1))
    warmup_gradient_accumulation_steps: int = option(
        1, "Passes of a step of the warm-up: as many questions in less memory.", at_least(1)
    )
    warmup_cache_dir: str = option(
        "~/.cache/dro_rl/warmup",
        "Where warmed-up models, and what solvable found, are kept: a folder that all nodes of a run share.",
        resumes=True,
    )

    def check(self) -> None:
        """Raise `InputError` for the first value that breaks its key's rule, or a rule over several keys."""
        check_keys(self)
        for name in ("dataset_name", "selector_model_name_or_path", "generator_model_name_or_path"):
            if not getattr(self, name):
                raise InputError(name, Phrase("missing"), "a recipe names its data and both models", f"Set {name}.")
        if self.keep_gold and self.num_documents is None:
            raise InputError(
                "keep_gold", True, "gold is kept where candidates are cut", "Set num_documents, or leave it out."
            )
        if (self.warmup_selector_order == "ranking") != (self.warmup_selector_ranking is not None):
            raise InputError(
                "warmup_selector_ranking",
                self.warmup_selector_ranking,
                "a ranking file goes with warmup_selector_order: ranking",
                "Set both or neither.",
            )
        if self.share_base:
            self._check_shared()
        if self.quantization != "none" and not (self.selector_lora_r or self.generator_lora_r):
            raise InputError(
                "quantization",
                self.quantization,
                "weights that train are not quantised, and no role has adapters",
                "Set selector_lora_r or generator_lora_r, to 16 say, or use none.",
            )

    def _check_shared(self) -> None:
        """Raise `InputError` unless the roles can have one base: the same weights, and none of them trained."""
        selector, generator = self.of("selector"), self.of("generator")
        bases = [
            (str(Path(each.model).resolve()) if Path(each.model).exists() else each.model, each.revision)
            for each in (selector, generator)
        ]
        if bases[0] != bases[1]:
            mine, theirs = (
                each.model if bases[0][0] != bases[1][0] else each.revision for each in (selector, generator)
            )
            raise InputError(
                "share_base",
                Phrase(f"the generator has {theirs}"),
                f"both roles have the same model in the same revision, and the selector has {mine}",
                "Name one for both, or leave share_base out.",
            )
        if not (selector.lora_r and generator.lora_r):
            raise InputError(
                "share_base",
                Phrase(f"selector_lora_r: {selector.lora_r}, generator_lora_r: {generator.lora_r}"),
                "what is shared is frozen, and each role trains adapters on it",
                "Set both, to 16 say, or leave share_base out.",
            )

    @property
    def warmup_questions(self) -> int:
        """Of a step of the warm-up, on each device."""
        return self.warmup_batch_size * self.warmup_gradient_accumulation_steps

    def of(self, role: Role) -> RoleSettings:
        """A role's own settings: the one place that reads keys by a role's name."""

        def key(name: str) -> Any:
            return getattr(self, name.format(role))

        name = key("{}_model_name_or_path")
        return RoleSettings(
            model=str(TOY_BASE if name == "toy" else Path(name).expanduser() if name.startswith("~") else name),
            revision=key("{}_model_revision"),
            prompt_template=key("{}_prompt_template"),
            lora_r=key("{}_lora_r"),
            warms=self.warmup in (role, "both"),
            warmup_steps=key("warmup_{}_steps"),
            warmup_learning_rate=key("warmup_{}_learning_rate"),
        )
