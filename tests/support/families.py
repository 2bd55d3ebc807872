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
    "initializer_range": 0.25,
}
"""What all have, unless their own settings say otherwise."""
LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "layer_types": ["linear_attention", "full_attention"] * 2,
}
MAMBA = {"mamba_n_heads": 4, "mamba_d_state": 16, "mamba_n_groups": 1, "mamba_chunk_size": 16}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
ROUTED = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
WINDOW = {"sliding_window": 8}
MIXED_WINDOW = {**WINDOW, "layer_types": ["sliding_attention", "full_attention"] * 2}
CONFIGS = {
    "llama": ("LlamaConfig", {}),
    "qwen2": ("Qwen2Config", {}),
    "qwen3": ("Qwen3Config", {}),
    "qwen3 sliding": ("Qwen3Config", {**WINDOW, "use_sliding_window": True, "max_window_layers": 2}),
    "mistral sliding": ("MistralConfig", WINDOW),
    "mixtral": ("MixtralConfig", EXPERTS),
    "qwen3 moe": ("Qwen3MoeConfig", ROUTED),
    "gpt-oss": ("GptOssConfig", {**EXPERTS, **MIXED_WINDOW}),
    "gemma2": ("Gemma2Config", {**WINDOW, "query_pre_attn_scalar": 12}),
    "gemma3": ("Gemma3TextConfig", {**MIXED_WINDOW, "query_pre_attn_scalar": 12}),
    "cohere2": ("Cohere2Config", MIXED_WINDOW),
    "granite": ("GraniteConfig", {"logits_scaling": 2.0, "embedding_multiplier": 3.0}),
    "olmo2": ("Olmo2Config", {}),
    "phi3": ("Phi3Config", {}),
    "lfm2": (
        "Lfm2Config",
        {"layer_types": ["conv", "full_attention"] * 2, "block_ff_dim": 64, "block_multiple_of": 16},
    ),
    "qwen3.5": ("Qwen3_5TextConfig", LINEAR),
    "qwen3-next": ("Qwen3NextConfig", {**LINEAR, **ROUTED, "shared_expert_intermediate_size": 32}),
    "falcon-h1": ("FalconH1Config", {**MAMBA, "mamba_d_ssm": 64, "mamba_d_head": 16}),
    "granite-4-h": (
        "GraniteMoeHybridConfig",
        {
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
GROUPED = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "moe_intermediate_size": 32}
GROUPED |= {"n_shared_experts": 1, "first_k_dense_replace": 1}
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 12}
LATENT |= {"num_key_value_heads": 4, "head_dim": 8}
PER_LAYER = {"global_head_dim": 12, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCAB}
MORE = {
    "qwen2.5-vl": ("Qwen2_5_VLConfig", MROPE, QWEN_VISION),
    "qwen3-vl moe": ("Qwen3VLMoeConfig", {**MROPE, **ROUTED}, {**QWEN_VISION, "deepstack_visual_indexes": [0]}),
    "gemma3 vl": (
        "Gemma3Config",
        {**MIXED_WINDOW, "model_type": "gemma3_text", "query_pre_attn_scalar": 12},
        {**VISION, "model_type": "siglip_vision_model"},
    ),
    "llava": ("LlavaConfig", {"model_type": "llama"}, {**VISION, "model_type": "clip_vision_model"}),
    "mistral3": ("Mistral3Config", {**WINDOW, "model_type": "mistral"}, {**VISION, "model_type": "pixtral"}),
    "internvl": (
        "InternVLConfig",
        {"model_type": "qwen2"},
        {**VISION, "image_size": [16, 16], "patch_size": [8, 8]},
    ),
    "smolvlm": ("SmolVLMConfig", {"model_type": "llama"}, VISION),
    "deepseek-v3": ("DeepseekV3Config", {**LATENT, **GROUPED}),
    "glm4 moe": ("Glm4MoeConfig", GROUPED),
    "gemma4": ("Gemma4TextConfig", {**MIXED_WINDOW, **PER_LAYER, "num_kv_shared_layers": 2}),
    "qwen3.5 moe": ("Qwen3_5MoeTextConfig", {**LINEAR, **ROUTED, "shared_expert_intermediate_size": 32}),
}
"""Mixtures of experts, and models that also read images, whose text is tried out once."""
ALWAYS = ("qwen2.5-vl", "gemma3 vl", "mistral3", "deepseek-v3", "gemma4")
"""Those of `MORE` that differ most; the others are tried out with the slow tests."""


def make_sharp_target(family: str, **changes) -> Target:
    """A random target with large weights: its next token depends on all of its context."""
    torch.manual_seed(3)
    name, settings, *vision = CONFIGS.get(family) or MORE[family]
    kind, settings = getattr(transformers, name), {**SHAPE, **settings, **changes}
    if vision:
        settings = {"text_config": settings, "vision_config": vision[0], "tie_word_embeddings": False}
    config = kind(**settings)
    auto = AutoModelForCausalLM if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING else AutoModelForImageTextToText
    model = auto.from_config(config)
    model.generation_config = GenerationConfig(pad_token_id=0)
    speed_up(model.eval().requires_grad_(False))
    return Target(model)
