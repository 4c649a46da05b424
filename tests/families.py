"""Small decoders of many architectures, built from their configs: what people bring."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

VOCABULARY = 96
SHAPE = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 256, "initializer_range": 0.3,
    "pad_token_id": 0, "bos_token_id": None, "eos_token_id": 1,
}  # fmt: skip
HEAD = {"head_dim": 16}
OF_FOUR = {"num_experts_per_tok": 2, "moe_intermediate_size": 24, "num_experts": 4}
LOCAL = {"num_local_experts": 4, "num_experts_per_tok": 2}
GPT = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 256}
LATENT = {
    "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 24,
    "kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16,
    "num_key_value_heads": 2, "first_k_dense_replace": 1,
}  # fmt: skip
LINEAR = {
    "num_hidden_layers": 4, "head_dim": 16, "linear_num_key_heads": 2, "linear_num_value_heads": 2,
    "linear_key_head_dim": 8, "linear_value_head_dim": 8,
}  # fmt: skip
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1}

ATTENTION: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "llama, tied": ("LlamaConfig", {"tie_word_embeddings": True}),
    "mistral": ("MistralConfig", {}),
    "qwen2": ("Qwen2Config", {}),
    "qwen3, tied": ("Qwen3Config", {**HEAD, "tie_word_embeddings": True}),
    "qwen2_moe": ("Qwen2MoeConfig", {**OF_FOUR, "shared_expert_intermediate_size": 24}),
    "qwen3_moe": ("Qwen3MoeConfig", {**HEAD, **OF_FOUR}),
    "mixtral": ("MixtralConfig", LOCAL),
    "olmoe": ("OlmoeConfig", {"num_experts": 4, "num_experts_per_tok": 2}),
    "granitemoe": ("GraniteMoeConfig", LOCAL),
    "phimoe": ("PhimoeConfig", LOCAL),
    "gpt_oss": ("GptOssConfig", {**HEAD, **LOCAL}),
    "llama4": (
        "Llama4TextConfig",
        {**HEAD, **LOCAL, "num_experts_per_tok": 1, "intermediate_size_mlp": 48, "interleave_moe_layer_step": 1},
    ),
    "deepseek_v2": ("DeepseekV2Config", {**LATENT, "topk_method": "greedy"}),
    "deepseek_v3": ("DeepseekV3Config", LATENT),
    "gpt_neox": ("GPTNeoXConfig", {}),
    "gpt2": ("GPT2Config", GPT),
    "gpt_bigcode": ("GPTBigCodeConfig", GPT),
    "gpt_neo": ("GPTNeoConfig", {"num_layers": 2, "num_heads": 2, "attention_types": [[["global", "local"], 1]]}),
    "gptj": ("GPTJConfig", {**GPT, "rotary_dim": 8}),
    "opt": ("OPTConfig", {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    "bloom": ("BloomConfig", {"n_layer": 2, "n_head": 2}),
    "mpt": ("MptConfig", {"d_model": 32, "n_heads": 2, "n_layers": 2, "max_seq_len": 256}),
    "falcon": ("FalconConfig", {}),
    "falcon, new": ("FalconConfig", {"new_decoder_architecture": True, "num_kv_heads": 1}),
    "falcon, alibi": ("FalconConfig", {"alibi": True}),
    "gemma": ("GemmaConfig", HEAD),
    "gemma2": ("Gemma2Config", {**HEAD, "query_pre_attn_scalar": 16}),
    "gemma3": ("Gemma3TextConfig", {**HEAD, "query_pre_attn_scalar": 16}),
    "phi": ("PhiConfig", {}),
    "phi3": ("Phi3Config", {}),
    "starcoder2": ("Starcoder2Config", {}),
    "olmo": ("OlmoConfig", {}),
    "olmo2": ("Olmo2Config", {}),
    "cohere": ("CohereConfig", {}),
    "cohere2": ("Cohere2Config", {}),
    "stablelm": ("StableLmConfig", {}),
    "granite": ("GraniteConfig", {}),
    "smollm3": ("SmolLM3Config", {}),
    "glm4": ("Glm4Config", HEAD),
    "nemotron": ("NemotronConfig", {}),
    "exaone4": ("Exaone4Config", {}),
    "seed_oss": ("SeedOssConfig", HEAD),
    "apertus": ("ApertusConfig", {}),
}
"""Decoders whose layers look at tokens alone."""

STATEFUL: dict[str, tuple[str, dict[str, Any]]] = {
    "lfm2": ("Lfm2Config", {"layer_types": ["conv", "full_attention"], "block_ff_dim": 48}),
    "qwen3_next": ("Qwen3NextConfig", {**LINEAR, **OF_FOUR, "shared_expert_intermediate_size": 24}),
    "qwen3_5": ("Qwen3_5TextConfig", LINEAR),
    "olmo_hybrid": ("OlmoHybridConfig", {"num_hidden_layers": 4}),
    "granitemoehybrid": (
        "GraniteMoeHybridConfig",
        {**LOCAL, **MAMBA, "layer_types": ["mamba", "attention"], "shared_intermediate_size": 48},
    ),
    "mamba": ("MambaConfig", {"state_size": 8}),
    "mamba2": ("Mamba2Config", {"num_heads": 4, "head_dim": 16, "state_size": 8, "n_groups": 1}),
    "falcon_mamba": ("FalconMambaConfig", {"state_size": 8}),
    "falcon_h1": ("FalconH1Config", {**HEAD, **MAMBA, "mamba_d_ssm": 64}),
    "jamba": (
        "JambaConfig",
        {
            "num_experts": 2, "num_experts_per_tok": 1, "attn_layer_period": 2, "attn_layer_offset": 1,
            "expert_layer_period": 2, "expert_layer_offset": 1, "mamba_d_state": 8, "mamba_dt_rank": 4,
            "use_mamba_kernels": False,
        },
    ),
    "bamba": ("BambaConfig", {**MAMBA, "attn_layer_indices": [1]}),
    "zamba2": (
        "Zamba2Config",
        {
            "mamba_d_state": 8, "n_mamba_heads": 4, "mamba_ngroups": 1, "layers_block_type": ["mamba", "hybrid"],
            "num_mem_blocks": 1, "attention_hidden_size": 64, "attention_head_dim": 32,
        },
    ),
    "nemotron_h": (
        "NemotronHConfig",
        {
            **HEAD, "hybrid_override_pattern": "M*-", "num_hidden_layers": 3, "mamba_num_heads": 4,
            "mamba_head_dim": 16, "ssm_state_size": 8, "n_groups": 1,
        },
    ),
    "minimax": ("MiniMaxConfig", {**HEAD, **LOCAL, "layer_types": ["linear_attention", "full_attention"]}),
    "recurrent_gemma": (
        "RecurrentGemmaConfig", {**HEAD, "num_hidden_layers": 3, "lru_width": 32, "attention_window_size": 64},
    ),
    "rwkv": ("RwkvConfig", {"context_length": 256, "attention_hidden_size": 32}),
}  # fmt: skip
"""Decoders that carry a state from token to token."""

FAMILIES = ATTENTION | STATEFUL


def build(family: str, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A random decoder whose distributions are far from flat, in evaluation mode."""
    config_class, own = FAMILIES[family]
    torch.manual_seed(seed)
    config = getattr(transformers, config_class)(**{**SHAPE, **own, **overrides})
    return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
