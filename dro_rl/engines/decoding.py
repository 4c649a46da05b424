"""Cached decoding with transformers: it needs nothing but the model, on any device.

Each prompt is prefilled once. Where the architecture takes packed rows (`attention.takes_packed_rows`), its m samples
decode side by side in one row over that one cache, so that memory and attention do not grow by m; elsewhere the cache
is expanded to m rows. Both draw the same tokens. A decoder that keeps a state (`attention.keeps_state`) reads m copies
of one prompt at a time: its state cannot be expanded, and padding would change it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import DynamicCache

from dro_rl.engines.protocol import GenerationRequest
from dro_rl.likelihood import Model, among_allowed, head_logits, without_adapters
from dro_rl.likelihood.attention import NO_MASK, keeps_state, takes_packed_rows
from dro_rl.likelihood.packing import Row, lay_out
from dro_rl.likelihood.prefill import Prefills
from dro_rl.proposal import Completion, SamplingParams, uniforms
from dro_rl.selection.constraint import SelectionConstraint

Step = Callable[[Tensor, int], Tensor]
"""From the tokens drawn at place t, (prompts, m), to the logits of the next, (prompts, m, vocabulary)."""
CACHES = ("past_key_values", "cache_params")
"""Under what names decoders that keep a state give their cache, and take it."""
CACHED = frozenset(
    {
        "falcon_h1", "falcon_mamba", "granitemoehybrid", "jamba", "lfm2", "mamba", "mamba2", "olmo_hybrid",
        "qwen3_5_text", "qwen3_next",
    }
)  # fmt: skip
"""Those of them whose cache gives what the whole sequence gives; all are tested. The others read everything again."""


class Decoder:
    """Samples from a model at hand: q is p at temperature 1, up to rounding.

    Args:
        model: the selector (or the generator, for greedy answers), or what stands for it.
        ends: the token that ends a completion, or several of which each does.
        batch_size: prompts decoded at once.
        shared_prefix: decode the m samples of a prompt over one cache where that is exact.
    """

    def __init__(
        self, model: Model, ends: int | Sequence[int], batch_size: int = 8, shared_prefix: bool = True
    ) -> None:
        self.model = model
        self.ends = (ends,) if isinstance(ends, int) else tuple(ends)
        self.batch_size = batch_size
        self.shared_prefix = shared_prefix

    @torch.no_grad()
    def generate(self, request: GenerationRequest, prefills: Prefills | None = None) -> list[list[Completion]]:
        """See `RolloutEngine.generate`. Prompts of similar length share a batch; results keep the given order.

        Args:
            prefills: where what a prompt comes to is kept with its graph, if its samples decode side by side.
        """
        prompts, m, sampling = request.prompts, request.num_generations, request.sampling
        order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
        results: list[list[Completion]] = [[] for _ in prompts]
        together = 1 if keeps_state(self.model.config) else self.batch_size
        for start in range(0, len(order), together):
            chunk = order[start : start + together]
            draws = torch.stack([uniforms(request.seeds[i], m, sampling.max_completion_length) for i in chunk])
            admitted = None if request.constraints is None else [request.constraints[i] for i in chunk]
            decoded = self._decode([prompts[i] for i in chunk], sampling, draws, admitted, prefills)
            for i, completions in zip(chunk, decoded, strict=True):
                results[i] = completions
        return results

    def _decode(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingParams,
        draws: Tensor,
        constraints: Sequence[SelectionConstraint] | None,
        prefills: Prefills | None,
    ) -> list[list[Completion]]:
        """Decode one batch. `draws`: (prompts, m, length) uniform numbers, one for each token."""
        device = self.model.device
        batch, m, length = draws.shape
        if keeps_state(self.model.config):
            begin = self._copied
        elif self.shared_prefix and takes_packed_rows(self.model, max(map(len, prompts)) + length):
            begin = partial(self._side_by_side, prefills=prefills)
        else:
            begin = self._expanded
        logits, step = begin([list(prompt) for prompt in prompts], m)
        logits, draws = logits.expand(batch, m, -1), draws.to(device)

        tokens = torch.empty(batch, m, length, dtype=torch.long, device=device)
        logps = torch.empty(batch, m, length, dtype=torch.float32, device=device)
        ends = torch.tensor(self.ends, device=device)
        finished = torch.zeros(batch, m, dtype=torch.bool, device=device)
        lengths = torch.full((batch, m), length, device=device)
        for t in range(length):
            if constraints is None:
                tokens[:, :, t], logps[:, :, t] = draw(logits, sampling, draws[:, :, t])
            else:
                allowed = self._allowed(constraints, tokens[:, :, :t])
                few, ids = among_allowed(logits.reshape(batch * m, -1), allowed)
                place, logp = draw(few, sampling, draws[:, :, t].reshape(-1))
                tokens[:, :, t] = ids.gather(-1, place.unsqueeze(-1)).view(batch, m)
                logps[:, :, t] = logp.view(batch, m)
            ended = ~finished & torch.isin(tokens[:, :, t], ends)
            lengths[ended] = t + 1
            finished |= ended
            if t == length - 1 or bool(finished.all()):
                break
            logits = step(tokens[:, :, t], t)
        return [
            [Completion(tuple(tokens[i, j, :n].tolist()), tuple(logps[i, j, :n].tolist())) for j, n in enumerate(row)]
            for i, row in enumerate(lengths.tolist())
        ]

    def _allowed(self, constraints: Sequence[SelectionConstraint], written: Tensor) -> list[tuple[int, ...]]:
        """The next tokens of each sample, in order; a finished one goes on with its end, which is dropped."""
        return [
            (constraint.end,) if constraint.end in sample else constraint.allowed(sample)
            for constraint, group in zip(constraints, written.tolist(), strict=True)
            for sample in group
        ]

    def _copied(self, prompts: list[list[int]], m: int) -> tuple[Tensor, Step]:
        """One prompt, m times over, with the cache that the decoder makes for itself where that is exact."""
        cached = self.model.config.get_text_config().model_type in CACHED
        ids = torch.tensor(prompts * m, device=self.model.device)
        output = self.model(input_ids=ids, use_cache=cached, logits_to_keep=1)

        def step(tokens: Tensor, t: int) -> Tensor:
            nonlocal ids, output
            new = tokens.view(m, 1)
            ids = new if cached else torch.cat([ids, new], dim=1)
            cache = {name: output[name] for name in CACHES if cached and output.get(name) is not None}
            output = self.model(input_ids=ids, use_cache=cached, logits_to_keep=1, **cache)
            return output.logits[:, -1].unsqueeze(0)

        return output.logits[:, -1].unsqueeze(0), step

    def _expanded(self, prompts: list[list[int]], m: int) -> tuple[Tensor, Step]:
        """Prompts padded on the left, and their cache expanded to m rows each."""
        device, width = self.model.device, max(map(len, prompts))
        ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts], device=device)
        mask = _left_padded_mask(prompts, width).to(device)
        cache = DynamicCache(config=self.model.config.get_text_config())
        logits = self.model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=(mask.cumsum(-1) - 1).clamp(min=0),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits
        if m > 1:
            cache.batch_repeat_interleave(m)
            mask = mask.repeat_interleave(m, dim=0)
        positions = mask.sum(dim=-1, keepdim=True)

        def step(tokens: Tensor, t: int) -> Tensor:
            return self.model(
                input_ids=tokens.reshape(-1, 1),
                attention_mask=torch.cat([mask, mask.new_ones(len(mask), t + 1)], dim=-1),
                position_ids=positions + t,
                past_key_values=cache,
                use_cache=True,
            ).logits.view(*tokens.shape, -1)

        return logits, step

    def _side_by_side(self, prompts: list[list[int]], m: int, prefills: Prefills | None = None) -> tuple[Tensor, Step]:
        """Prompts without padding, and their m samples as m queries of one row over one cache."""
        if prefills is None:
            logits, cache, mask = self._prefill_packed(prompts)
        else:
            logits, cache, mask = self._prefill_kept(prompts, prefills)
        positions = mask.sum(dim=-1, keepdim=True)

        def step(tokens: Tensor, t: int) -> Tensor:
            return self.model(
                input_ids=tokens,
                attention_mask=_side_by_side_mask(mask, m, t + 1),
                position_ids=(positions + t).expand(-1, m),
                past_key_values=cache,
                use_cache=True,
            ).logits

        return logits, step

    def _prefill_packed(self, prompts: list[list[int]]) -> tuple[Tensor, DynamicCache, Tensor]:
        """Prompts packed in one row, whose cache is then laid out as a batch.

        Returns:
            the next token's logits (prompts, 1, vocabulary), the cache, and the mask of what is no padding.
        """
        device, width = self.model.device, max(map(len, prompts))
        packed = DynamicCache()  # no window is narrower than the positions, and a window's cache would drop rows
        layout = lay_out([Row(prompt, ()) for prompt in prompts])
        lengths = [len(prompt) for prompt in prompts]
        ends = torch.tensor(lengths).cumsum(0)
        logits = self.model(
            input_ids=torch.tensor([layout.ids], device=device),
            position_ids=torch.tensor([layout.positions], device=device),
            attention_mask=NO_MASK.to(device),
            packing=layout.segments,
            past_key_values=packed,
            use_cache=True,
            logits_to_keep=(ends - 1).to(device),
        ).logits
        if len(prompts) > 1:
            layers: list[Any] = packed.layers  # attention layers all: `takes_packed_rows` saw to it
            for layer in layers:
                layer.keys = _as_batch(layer.keys.split(lengths, dim=2), width)
                layer.values = _as_batch(layer.values.split(lengths, dim=2), width)
        return logits.transpose(0, 1), packed, _left_padded_mask(prompts, width).to(device)

    def _prefill_kept(self, prompts: list[list[int]], prefills: Prefills) -> tuple[Tensor, DynamicCache, Tensor]:
        """`_prefill_packed`, each prompt by itself and kept for training."""
        read, width = [prefills.read(self.model, prompt) for prompt in prompts], max(map(len, prompts))
        cache = DynamicCache()
        for layer in sorted(read[0].states):
            keys, values = (_as_batch([each.states[layer][i].detach() for each in read], width) for i in range(2))
            cache.update(keys, values, layer)
        last = torch.cat([each.last.detach() for each in read])
        logits = head_logits(without_adapters(self.model), last).unsqueeze(1)
        return logits, cache, _left_padded_mask(prompts, width).to(self.model.device)


def _left_padded_mask(prompts: list[list[int]], width: int) -> Tensor:
    return torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])


def _as_batch(states: Sequence[Tensor], width: int) -> Tensor:
    """(1, heads, tokens, size) of each prompt as (prompts, heads, width, size), padded on the left."""
    return torch.cat([functional.pad(piece, (0, 0, width - piece.shape[2], 0)) for piece in states])


def draw(logits: Tensor, sampling: SamplingParams, u: Tensor) -> tuple[Tensor, Tensor]:
    """Draw one token a sample by inverting the distribution function at `u`, and its log q.

    Args:
        logits: (..., vocabulary).
        sampling: the proposal.
        u: (...) uniform numbers on [0, 1); unused when greedy.

    Returns:
        token ids (...) and their log-probabilities under the distribution they were drawn from (...), float32. A greedy
        token reports its log-probability under p.
    """
    logits = logits.float()
    if sampling.temperature == 0:
        logps = logits.log_softmax(dim=-1)
        best = logps.max(dim=-1)
        return best.indices, best.values
    logps = truncate(logits / sampling.temperature, sampling).log_softmax(dim=-1)
    cumulative = logps.double().exp().cumsum(dim=-1)
    threshold = (u.double() * cumulative[..., -1]).unsqueeze(-1)
    token = torch.searchsorted(cumulative, threshold, right=True).clamp(max=logits.shape[-1] - 1)
    return token.squeeze(-1), logps.gather(-1, token).squeeze(-1)


def truncate(logits: Tensor, sampling: SamplingParams) -> Tensor:
    """Set to −inf what top_k, top_p and min_p exclude, in that order, each on what the one before left."""
    if sampling.top_k:
        kth = logits.topk(min(sampling.top_k, logits.shape[-1]), dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < kth, float("-inf"))
    if sampling.top_p < 1:
        values, order = logits.sort(dim=-1, descending=True)
        probabilities = values.softmax(dim=-1)
        before = probabilities.cumsum(dim=-1) - probabilities
        outside = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, order, before >= sampling.top_p)
        logits = logits.masked_fill(outside, float("-inf"))
    if sampling.min_p > 0:
        probabilities = logits.softmax(dim=-1)
        floor = sampling.min_p * probabilities.amax(dim=-1, keepdim=True)
        logits = logits.masked_fill(probabilities < floor, float("-inf"))
    return logits


def _side_by_side_mask(prompt_mask: Tensor, m: int, steps: int) -> Tensor:
    """(batch, 1, m, width + m·steps) bool: sample j sees the prompt and its own tokens, every m-th after it."""
    prompt = prompt_mask.bool().unsqueeze(1).expand(-1, m, -1)
    own = torch.eye(m, dtype=torch.bool, device=prompt_mask.device).repeat(1, steps)
    return torch.cat([prompt, own.expand(len(prompt), -1, -1)], dim=-1).unsqueeze(1)
