"""Both language models in one module, so that the stock Trainer, DDP, FSDP and DeepSpeed see one model.

`SelectorGenerator.forward` scores a micro-batch for both roles and returns both losses: one forward, one backward.
Loading, adapters and saving of each role are here too. It knows of tensors and files, not of rollouts or recipes.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)

from dro_rl.errors import InputError, Phrase, first_line
from dro_rl.likelihood import Scoring, answer_logp, row_logps
from dro_rl.objective import generator_loss, selector_loss
from dro_rl.packing import Row

Role = Literal["selector", "generator"]
ROLES: tuple[Role, Role] = ("selector", "generator")


@dataclass(frozen=True, slots=True)
class WeightedRows:
    """What one role scores in a micro-batch.

    Args:
        rows: prompts with their completions. The selector's completions are a question's distinct samples; the
            generator's are the accepted answers, which make one log-likelihood together.
        coefficients: what multiplies each log-probability in the loss: one a completion for the selector, in row order,
            one a row for the generator. Duplicates of a sample are one completion with their coefficients summed.
    """

    rows: Sequence[Row]
    coefficients: Sequence[float]


Weigh = Callable[[Tensor, Tensor], tuple[Sequence[float], Sequence[float]]]
Switch = Callable[[str], Any]


class SelectorGeneratorOutput(NamedTuple):
    """Losses (scalars, with gradient; None for a role that was not asked), log-probabilities (detached, nats)."""

    selector_loss: Tensor | None
    generator_loss: Tensor | None
    selection_logps: Tensor | None


class SelectorGenerator(nn.Module):
    """A selector and a generator.

    Args:
        selector, generator: causal LMs, or PEFT models around them.
    """

    def __init__(self, selector: PreTrainedModel, generator: PreTrainedModel) -> None:
        super().__init__()
        self.selector = selector
        self.generator = generator

    @property
    def config(self) -> Any:
        """The selector's: the Trainer asks a model for one."""
        return self.selector.config

    def forward(
        self,
        selector: WeightedRows | None = None,
        generator: WeightedRows | None = None,
        scoring: Scoring | None = None,
        weigh: Weigh | None = None,
        switch: Switch = lambda role: None,
        call: tuple[Role, Callable[[Any], Any]] | None = None,
    ) -> Any:
        """Score a micro-batch for training, or call a function with one role.

        The second use exists for sharded models, whose parameters are gathered only within the forward of the module
        that was wrapped.

        Args:
            selector, generator: the rows of each role.
            scoring: how they are scored.
            weigh: gives the coefficients of both roles from the detached log-probabilities of both, in place of those
                that the rows have: on fresh rollouts this one pass gives likelihoods, weights and losses.
            switch: told the role whose computation begins, in the backward pass too.
            call: a role and a function of it.
        """
        if call is not None:
            role, function = call
            return function(getattr(self, role))
        scoring = scoring or Scoring()
        selection = answers = None
        if selector is not None:
            switch("selector")
            scored = row_logps(self.selector, selector.rows, shared_prefix=scoring.shared_prefix)
            selection = torch.stack([logps.sum() for row in scored for logps in row])
            # Backward begins with the model that came last, and comes to this tensor when it is through with it.
            _on_backward(selection, lambda: switch("selector"))
        if generator is not None:
            switch("generator")
            scored = row_logps(
                self.generator, generator.rows, shared_prefix=scoring.shared_prefix, prefix_tree=scoring.prefix_tree
            )
            answers = torch.stack(
                [answer_logp(row, scoring.answer_likelihood, scoring.answer_aliases) for row in scored]
            )
            _on_backward(answers, lambda: switch("generator"))
        coefficients: dict[str, Sequence[float]] = {
            "selector": selector.coefficients if selector else (),
            "generator": generator.coefficients if generator else (),
        }
        if weigh is not None and selection is not None and answers is not None:
            coefficients["selector"], coefficients["generator"] = weigh(selection.detach(), answers.detach())
        return SelectorGeneratorOutput(
            None if selection is None else selector_loss(selection, _like(selection, coefficients["selector"])),
            None if answers is None else generator_loss(answers, _like(answers, coefficients["generator"])),
            None if selection is None else selection.detach(),
        )

    def gradient_checkpointing_enable(self, **options: Any) -> None:
        """Trade compute for activation memory in every role that trains. `options` are the models' own."""
        for role in ROLES:
            model = getattr(self, role)
            if any(parameter.requires_grad for parameter in model.parameters()):
                model.gradient_checkpointing_enable(**options)
                # With a frozen base under adapters, checkpointed layers need an input that asks for gradients.
                model.enable_input_require_grads()

    def gradient_checkpointing_disable(self) -> None:
        for role in ROLES:
            getattr(self, role).gradient_checkpointing_disable()

    def freeze(self, role: Role) -> None:
        """Keep a role as it is: no gradients, no optimizer state, no update."""
        getattr(self, role).requires_grad_(False)


def _on_backward(tensor: Tensor, action: Callable[[], Any]) -> None:
    def hook(gradient: Tensor) -> None:
        action()

    if tensor.requires_grad:
        tensor.register_hook(hook)


def _like(logps: Tensor, coefficients: Sequence[float]) -> Tensor:
    return torch.tensor(coefficients, dtype=torch.float32, device=logps.device)


class _Routed:
    """One role of a sharded model, called through the module that was wrapped."""

    def __init__(self, wrapped: nn.Module, role: Role, plain: PreTrainedModel, device: torch.device) -> None:
        self.wrapped, self.role, self._plain = wrapped, role, plain
        self.config, self.device = plain.config, device
        self._pulse = torch.zeros(1, device=device)

    def set_attn_implementation(self, name: str) -> None:
        self._plain.set_attn_implementation(name)

    def __call__(self, **inputs: Any) -> Any:
        return self.within(lambda model: model(**inputs))

    def within(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Call `function` with the role itself, while its parameters are there."""
        self._anyone_busy(True)
        return self.wrapped(call=(self.role, lambda model: function(model, *arguments)))

    def drain(self) -> None:
        """Keep calling, with one token, while another process still has work: each call gathers parameters together."""
        token = torch.zeros(1, 1, dtype=torch.long, device=self.device)
        while self._anyone_busy(False):
            self.wrapped(call=(self.role, lambda model: model(input_ids=token, logits_to_keep=1, use_cache=False)))

    def _anyone_busy(self, busy: bool) -> bool:
        self._pulse.fill_(float(busy))
        torch.distributed.all_reduce(self._pulse)
        return bool(self._pulse.item() > 0)


@contextmanager
def inference(model: SelectorGenerator, wrapped: nn.Module, role: Role, accelerator: Accelerator) -> Iterator[Any]:
    """One role, ready to be called without gradient as often as each process likes.

    Where parameters are sharded (FSDP, ZeRO-3) every process must take part in each call, so one that has finished
    stands by until all have.
    """
    plain = getattr(model, role)
    was_training = model.training
    model.eval()
    sharded = accelerator.distributed_type == DistributedType.FSDP or is_zero3(accelerator)
    target = _Routed(wrapped, role, plain, accelerator.device) if sharded else plain
    try:
        with torch.no_grad(), accelerator.autocast():
            yield target
            if isinstance(target, _Routed):
                target.drain()
    finally:
        model.train(was_training)


def is_zero3(accelerator: Accelerator) -> bool:
    """Whether DeepSpeed shards the parameters themselves."""
    plugin = accelerator.state.deepspeed_plugin if accelerator.distributed_type == DistributedType.DEEPSPEED else None
    return plugin is not None and plugin.zero_stage == 3


# Loading


def check_model(name: str, place: str, *, revision: str | None = None, trust_remote_code: bool = False) -> None:
    """Refuse what is not a causal LM with a tokenizer that fits it, before anything large is read.

    Raises:
        InputError: naming `place`, the recipe key.
    """
    path = Path(name)
    if path.exists() and not (path / "config.json").is_file():
        raise InputError(place, name, "a model folder holds a config.json", "Check the path.")
    try:
        config = AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code)
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code)
    except Exception as error:
        # A hub, a config class and a tokenizer library stand behind these, each with errors of its own.
        raise InputError(
            place,
            name,
            f"this is a model folder or a hub name ({first_line(error)})",
            "Check the name and the network.",
        ) from None
    if config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and not (
        config.auto_map if trust_remote_code else None
    ):
        raise InputError(
            place, f"{name} ({config.model_type})", "this is a causal language model", "Use a decoder-only model."
        )
    encodes = config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(config, "is_decoder", False)
    if config.is_encoder_decoder or encodes:
        raise InputError(
            place,
            f"{name} ({config.model_type})",
            "this is a causal language model, and an encoder reads what comes after",
            "Use a decoder-only model.",
        )
    rows = config.get_text_config().vocab_size
    if len(tokenizer) > rows:
        raise InputError(
            place,
            f"{name}: {len(tokenizer)} tokens, {rows} embeddings",
            "every token of the tokenizer has an embedding in the model",
            "Use the tokenizer that the model was trained with, or resize its embeddings.",
        )
    if not tokenizer.is_fast:
        raise InputError(place, name, "the tokenizer is a fast one (documents are cut by offsets)", "Convert it.")
    if tokenizer.eos_token_id is None:
        raise InputError(place, name, "the tokenizer has an end-of-sequence token", "Set eos_token in its config.")


@contextmanager
def whole_parameters() -> Iterator[None]:
    """Build or load models whole, also where ZeRO-3 would shard them on the way."""
    from transformers.integrations import deepspeed

    sharding = deepspeed._hf_deepspeed_config_weak_ref
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = sharding


def load_model(name: str, **kwargs: Any) -> PreTrainedModel:
    """`AutoModelForCausalLM.from_pretrained`, float32 unless `dtype` says otherwise."""
    kwargs.setdefault("dtype", torch.float32)
    return AutoModelForCausalLM.from_pretrained(name, **kwargs)


def load_tokenizer(name: str, **kwargs: Any) -> PreTrainedTokenizerBase:
    """The tokenizer, with a padding token, which saving and serving expect; prompts are padded without it."""
    tokenizer = AutoTokenizer.from_pretrained(name, **kwargs)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


@dataclass(frozen=True, slots=True)
class LoraSettings:
    """Low-rank adapters for one role: rank `r`, scale `alpha` / r, on `target_modules` (None: all linear layers)."""

    r: int
    alpha: int
    dropout: float
    target_modules: tuple[str, ...] | None


def add_adapter(model: PreTrainedModel, lora: LoraSettings) -> Any:
    """Freeze the model and put trainable adapters on it. The head stays as it is: its adapter would be left out of
    completion-only scoring in some architectures."""
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        raise InputError(
            "selector_lora_r / generator_lora_r", lora.r, "adapters need the peft extra", "pip install 'dro_rl[peft]'"
        ) from None
    if lora.target_modules and "lm_head" in lora.target_modules:
        raise InputError(
            "lora_target_modules", "lm_head", "adapters go on the layers below the head", "Take lm_head off the list."
        )
    config = LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=list(lora.target_modules) if lora.target_modules else "all-linear",
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, config)


# Saving


def is_adapted(model: nn.Module) -> bool:
    """Whether the role is a PEFT model."""
    return hasattr(model, "peft_config")


def save_role(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    state_dict: dict[str, Tensor] | None = None,
) -> None:
    """Save one role for a checkpoint: the whole model, or its adapters alone."""
    model.save_pretrained(folder, state_dict=state_dict)
    tokenizer.save_pretrained(folder)


def load_role(model: PreTrainedModel, folder: Path) -> None:
    """Load into `model` what `save_role` wrote, in place and bit for bit."""
    from safetensors.torch import load_file

    if is_adapted(model):
        from peft import set_peft_model_state_dict

        set_peft_model_state_dict(model, load_file(folder / "adapter_model.safetensors"))
        return
    state: dict[str, Tensor] = {}
    for part in sorted(folder.glob("model*.safetensors")):
        state.update(load_file(part))
    missing, unexpected = model.load_state_dict(state, strict=False)
    tied = set(model.all_tied_weights_keys)
    if unexpected or set(missing) - tied:
        raise InputError(
            str(folder),
            Phrase(f"{len(missing)} missing, {len(unexpected)} unexpected tensors"),
            "the checkpoint belongs to this model",
            "Resume with the recipe that wrote it.",
        )
    model.tie_weights()


def export_role(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    state_dict: dict[str, Tensor] | None = None,
    extra: Mapping[str, str] | None = None,
) -> None:
    """Write one role to serve: a plain causal LM with its tokenizer, and `extra` text files by name.

    Adapters are merged into the model, and kept in `adapter/`.

    Written beside and renamed, so that the folder is whole or the one before.
    """
    beside = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(beside, ignore_errors=True)
    if is_adapted(model):
        from peft import PeftModel

        assert isinstance(model, PeftModel)
        model.save_pretrained(beside / "adapter", state_dict=state_dict)
        merged_copy(model, state_dict).save_pretrained(beside)
    else:
        model.save_pretrained(beside, state_dict=state_dict)
    tokenizer.save_pretrained(beside)
    for name, text in (extra or {}).items():
        (beside / name).write_text(text, encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    beside.rename(folder)


def merged_copy(model: Any, state_dict: Mapping[str, Tensor] | None = None) -> PreTrainedModel:
    """The model with its adapters merged, made of the weights at hand; the trained model is never touched.

    Args:
        model: a PEFT model.
        state_dict: its whole state, where it is sharded.
    """
    from peft import get_peft_model

    base = model.get_base_model()
    with whole_parameters(), torch.random.fork_rng():  # what is drawn here is replaced below
        copy = get_peft_model(type(base)(base.config), model.peft_config[model.active_adapter])
    copy.load_state_dict(model.state_dict() if state_dict is None else state_dict)
    merged = copy.merge_and_unload().to(base.dtype)
    merged.generation_config = base.generation_config
    return merged
