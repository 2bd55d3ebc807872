"""Tiny targets of many families whose text depends sharply on its context, so that a wrong cache shows in it."""

import torch
import transformers
from transformers import AutoModelForCausalLM, GenerationConfig

from dpace.fast.speed_up import speed_up
from dpace.target import Target

VOCAB = 64
SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
    "tie_word_embeddings": False,
}
PLAIN_SHAPE = {key: value for key, value in SHAPE.items() if key != "head_dim"}
LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "layer_types": ["linear_attention", "full_attention"] * 2,
}
MAMBA = {"mamba_n_heads": 4, "mamba_d_state": 16, "mamba_n_groups": 1, "mamba_chunk_size": 16}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
MIXED_WINDOW = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"] * 2}
CONFIGS = {
    "llama": ("LlamaConfig", SHAPE),
    "qwen2": ("Qwen2Config", PLAIN_SHAPE),
    "qwen3": ("Qwen3Config", SHAPE),
    "qwen3 sliding": (
        "Qwen3Config",
        {**SHAPE, "use_sliding_window": True, "max_window_layers": 2, "sliding_window": 8},
    ),
    "mistral sliding": ("MistralConfig", {**SHAPE, "sliding_window": 8}),
    "mixtral": ("MixtralConfig", {**SHAPE, **EXPERTS}),
    "qwen3 moe": ("Qwen3MoeConfig", {**SHAPE, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}),
    "gpt-oss": ("GptOssConfig", {**SHAPE, **EXPERTS, **MIXED_WINDOW}),
    "gemma2": ("Gemma2Config", {**SHAPE, "sliding_window": 8, "query_pre_attn_scalar": 12}),
    "gemma3": ("Gemma3TextConfig", {**SHAPE, **MIXED_WINDOW, "query_pre_attn_scalar": 12}),
    "cohere2": ("Cohere2Config", {**PLAIN_SHAPE, **MIXED_WINDOW}),
    "granite": ("GraniteConfig", {**PLAIN_SHAPE, "logits_scaling": 2.0, "embedding_multiplier": 3.0}),
    "olmo2": ("Olmo2Config", PLAIN_SHAPE),
    "phi3": ("Phi3Config", PLAIN_SHAPE),
    "lfm2": (
        "Lfm2Config",
        {**PLAIN_SHAPE, "layer_types": ["conv", "full_attention"] * 2, "block_ff_dim": 64, "block_multiple_of": 16},
    ),
    "qwen3.5": ("Qwen3_5TextConfig", {**SHAPE, **LINEAR}),
    "qwen3-next": (
        "Qwen3NextConfig",
        {
            **SHAPE,
            **LINEAR,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "shared_expert_intermediate_size": 32,
        },
    ),
    "falcon-h1": ("FalconH1Config", {**SHAPE, **MAMBA, "mamba_d_ssm": 64, "mamba_d_head": 16}),
    "granite-4-h": (
        "GraniteMoeHybridConfig",
        {
            **PLAIN_SHAPE,
            **MAMBA,
            "mamba_d_head": 24,
            "layer_types": ["mamba", "attention"] * 2,
            "num_local_experts": 2,
            "num_experts_per_tok": 1,
            "shared_intermediate_size": 32,
        },
    ),
    "jamba": (
        "JambaConfig",
        {
            **PLAIN_SHAPE,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "num_experts": 2,
            "num_experts_per_tok": 1,
            "mamba_d_state": 8,
        },
    ),
}
NOT_DRAFTED_FOR = {"jamba": "cannot read several tokens at once"}
"""Families that a drafter is refused for, and the reason."""
NOT_BATCHED = {"qwen3 sliding", "mistral sliding", "gpt-oss", "gemma2", "gemma3", "cohere2", "lfm2", "qwen3.5"}
NOT_BATCHED |= {"qwen3-next", "falcon-h1", "granite-4-h"}
"""Families whose layers are not all full attention."""


def make_sharp_target(family: str, **changes) -> Target:
    """A random target with large weights: its next token depends on all of its context."""
    torch.manual_seed(3)
    name, settings = CONFIGS[family]
    config = getattr(transformers, name)(**{**settings, "initializer_range": 0.25, **changes})
    model = AutoModelForCausalLM.from_config(config)
    model.generation_config = GenerationConfig(pad_token_id=0)
    speed_up(model.eval().requires_grad_(False))
    return Target(model)
