"""Tiny targets of many families whose text depends sharply on its context, so that a wrong cache shows in it."""

import torch
import transformers
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    GenerationConfig,
)

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


VISION = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
VISION |= {"image_size": 16, "patch_size": 8}
QWEN_VISION = {"depth": 1, "hidden_size": 32, "num_heads": 2, "out_hidden_size": 48, "intermediate_size": 32}
QWEN_VISION |= {"patch_size": 8}
MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 2, 2]}}
ROUTED = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
GROUPED = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "moe_intermediate_size": 32}
GROUPED |= {"n_shared_experts": 1, "first_k_dense_replace": 1}
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 12}
PER_LAYER = {"global_head_dim": 12, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCAB}
MORE = {
    "qwen2.5-vl": ("Qwen2_5_VLConfig", {**PLAIN_SHAPE, **MROPE}, QWEN_VISION),
    "qwen3-vl moe": (
        "Qwen3VLMoeConfig",
        {**SHAPE, **MROPE, **ROUTED},
        {**QWEN_VISION, "deepstack_visual_indexes": [0]},
    ),
    "gemma3 vl": (
        "Gemma3Config",
        {**SHAPE, **MIXED_WINDOW, "model_type": "gemma3_text", "query_pre_attn_scalar": 12},
        {**VISION, "model_type": "siglip_vision_model"},
    ),
    "llava": ("LlavaConfig", {**SHAPE, "model_type": "llama"}, {**VISION, "model_type": "clip_vision_model"}),
    "mistral3": (
        "Mistral3Config",
        {**SHAPE, "model_type": "mistral", "sliding_window": 8},
        {**VISION, "model_type": "pixtral"},
    ),
    "internvl": (
        "InternVLConfig",
        {**PLAIN_SHAPE, "model_type": "qwen2"},
        {**VISION, "image_size": [16, 16], "patch_size": [8, 8]},
    ),
    "smolvlm": ("SmolVLMConfig", {**SHAPE, "model_type": "llama"}, VISION),
    "deepseek-v3": ("DeepseekV3Config", {**PLAIN_SHAPE, "num_key_value_heads": 4, **LATENT, **GROUPED}),
    "glm4 moe": ("Glm4MoeConfig", {**SHAPE, **GROUPED}),
    "gemma4": ("Gemma4TextConfig", {**SHAPE, **MIXED_WINDOW, **PER_LAYER, "num_kv_shared_layers": 2}),
    "qwen3.5 moe": (
        "Qwen3_5MoeTextConfig",
        {**SHAPE, **LINEAR, **ROUTED, "shared_expert_intermediate_size": 32},
    ),
}
"""Mixtures of experts, and models that also read images, whose text is tried out once."""
ALWAYS = ("qwen2.5-vl", "gemma3 vl", "mistral3", "deepseek-v3", "gemma4")
"""Those of `MORE` that differ most; the others are tried out with the slow tests."""


def make_sharp_target(family: str, **changes) -> Target:
    """A random target with large weights: its next token depends on all of its context."""
    torch.manual_seed(3)
    name, settings, *vision = CONFIGS.get(family) or MORE[family]
    kind, settings = getattr(transformers, name), {**settings, "initializer_range": 0.25, **changes}
    if vision:
        settings = {"text_config": settings, "vision_config": vision[0], "tie_word_embeddings": False}
    config = kind(**settings)
    auto = AutoModelForCausalLM if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING else AutoModelForImageTextToText
    model = auto.from_config(config)
    model.generation_config = GenerationConfig(pad_token_id=0)
    speed_up(model.eval().requires_grad_(False))
    return Target(model)
