"""The checks of a drafter's config.json against the published layout and its target."""

from dpace.engines import config_probes as probe
from dpace.engines.subject import Check

FIX_COPY_AGAIN = "copy or export the drafter again"
FIX_MAKE_EQUAL = "make both equal: some engines read one, some the other"
FIX_WRITE_TENSORS = "write the number that the tensors have"
FIX_USE_TARGETS = "write the target's value, or take a drafter that was trained for this target"
SIZES = (
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "intermediate_size",
    "hidden_size",
)
"""Checks of what decides how large the network is."""
FILE_CHECKS = (
    Check("config readable", "fails", probe.file("config.json", "a JSON object"), FIX_COPY_AGAIN),
    Check("weights readable", "fails", probe.file("model.safetensors", "safetensors"), FIX_COPY_AGAIN),
    Check("recipe readable", "warns", probe.file("recipe.yaml", "YAML, or no file"), "copy it again, or delete it"),
)


CONFIG_CHECKS = (
    Check(
        "architecture",
        "fails",
        probe.architecture,
        "write the expected values; convert other layouts with `dpace import`",
    ),
    Check(
        "hidden_act",
        "fails",
        probe.equals("hidden_act", lambda _: "silu"),
        "write silu, the only one that this layout has",
    ),
    Check("attention_bias", "fails", probe.equals("attention_bias", lambda _: False), "write false: no bias is stored"),
    Check("rms_norm_eps", "warns", probe.written("rms_norm_eps"), "write the value: engines assume 1e-6 without it"),
    Check("rope theta", "fails", probe.rope_theta, "write the target's value in rope_parameters and at the top level"),
    Check("rope scaling", "fails", probe.rope_scaling, "write the target's values in rope_parameters and rope_scaling"),
    Check(
        "rope spellings",
        "warns",
        probe.rope_spellings,
        "write both spellings: an engine that reads only the other one assumes 10000",
    ),
    Check("rope agreement", "fails", probe.rope_agreement, FIX_MAKE_EQUAL),
    Check("rope layout", "fails", probe.rope_layout, "remove these keys: the layout rotates halves of whole heads"),
    Check("head_dim", "fails", probe.head_dim, "write the value: engines assume 128 without it"),
    Check("convolutions", "fails", probe.convolutions, "write the kernel and group size that the tensors have"),
    Check("num_attention_heads", "fails", probe.size("num_attention_heads", "query", "head"), FIX_WRITE_TENSORS),
    Check("num_key_value_heads", "fails", probe.size("num_key_value_heads", "key", "head"), FIX_WRITE_TENSORS),
    Check("intermediate_size", "fails", probe.size("intermediate_size", "inner"), FIX_WRITE_TENSORS),
    Check(
        "num_hidden_layers",
        "fails",
        probe.num_layers,
        "write the number that the tensors have, or copy the weights again",
    ),
    Check("hidden_size", "fails", probe.hidden_size, FIX_USE_TARGETS),
    Check(
        "vocab_size",
        "fails",
        probe.equals("vocab_size", lambda subject: len(subject.target.head.weight)),
        FIX_USE_TARGETS,
    ),
    Check(
        "num_target_layers",
        "fails",
        probe.equals("num_target_layers", lambda subject: subject.target.num_layers),
        FIX_USE_TARGETS,
    ),
    Check(
        "dflash_config",
        "fails",
        probe.nested,
        "write both keys there: vLLM reads no others, and takes other layers without them",
    ),
    Check("layer ids agree", "fails", probe.agreement("target_layer_ids"), FIX_MAKE_EQUAL),
    Check(
        "layer ids order",
        "fails",
        probe.layer_ids("order", "ascending integers, each once"),
        "sort the ids together with the columns of fc: vLLM sorts only the ids",
    ),
    Check(
        "layer ids range",
        "fails",
        probe.layer_ids("range", "in 0 .. {before}"),
        "write ids of layers that the target has, counted from 0",
    ),
    Check(
        "last layer",
        "fails",
        probe.layer_ids("last", "ids without {last}"),
        "train without the last layer: some engines normalize its output, others stop with an error",
    ),
    Check(
        "layer ids offset",
        "warns",
        probe.layer_offset,
        "undo the shift: this layout writes i where speculators and GGUF write i + 1",
    ),
    Check(
        "layer ids as trained",
        "fails",
        probe.as_trained("target_layer_ids", probe.trained_ids),
        "write the ids that the drafter was trained with",
    ),
    Check(
        "fc columns", "fails", probe.fc_columns, "write the layers that the drafter was trained with, in the same order"
    ),
    Check(
        "mask token",
        "fails",
        probe.mask_token,
        "write the token that the drafter was trained with; if it is this one, train again",
    ),
    Check("mask tokens agree", "fails", probe.agreement("mask_token_id"), FIX_MAKE_EQUAL),
    Check(
        "mask_embedding.pt",
        "warns",
        probe.mask_file,
        "remove the file: vLLM, SGLang and llama.cpp read it, others do not",
    ),
    Check(
        "block_size",
        "fails",
        probe.block_size,
        "write the block size of the training: one known token and the draft slots",
    ),
    Check(
        "block_size written",
        "warns",
        probe.written("block_size"),
        "write it at the top level, the only place where SpecForge looks",
    ),
    Check("block sizes agree", "fails", probe.agreement("block_size"), FIX_MAKE_EQUAL),
    Check(
        "block_size as trained",
        "fails",
        probe.as_trained("block_size", probe.trained_size),
        "write the block size of the training: draft tokens + 1",
    ),
    Check("is_causal", "fails", probe.causality, "write false: the slots of a block see each other"),
    Check(
        "is_causal written",
        "warns",
        probe.written("is_causal"),
        "write false: engines assume different values without it",
    ),
    Check("layer_types", "fails", probe.layer_types, "write full_attention for every layer"),
    Check("sliding window", "warns", probe.sliding_window, "write the expected values: full attention has no window"),
    Check(
        "tie_word_embeddings",
        "fails",
        probe.equals("tie_word_embeddings", lambda _: False),
        "write false: the drafter ties no weights",
    ),
    Check(
        "final_logit_softcapping",
        "fails",
        probe.scale("final_logit_softcapping", None, lambda target: target.head.softcap),
        FIX_USE_TARGETS,
    ),
    Check(
        "input_embedding_scale",
        "fails",
        probe.scale("input_embedding_scale", 1.0, lambda target: target.embed_scale),
        FIX_USE_TARGETS,
    ),
    Check(
        "output_multiplier",
        "fails",
        probe.scale("output_multiplier", 1.0, lambda target: target.head.multiplier),
        FIX_USE_TARGETS,
    ),
    Check(
        "engine", "warns", probe.engine_reads_scales, "use another engine: vLLM's V1 runner does not read these keys"
    ),
    Check(
        "target",
        "warns",
        probe.recorded("target"),
        "name the target that the drafter was trained for, in the same variant (base or instruct)",
    ),
    Check("target dtype", "warns", probe.recorded("dtype"), "expect slightly different accepted lengths"),
    Check(
        "tokenizer", "fails", probe.recorded("tokenizer_sha256"), "use the tokenizer that the drafter was trained with"
    ),
    Check(
        "chat template",
        "warns",
        probe.recorded("chat_template_sha256"),
        "use the template of the training, or train on responses with this one",
    ),
    Check(
        "thinking",
        "warns",
        probe.recorded("thinking"),
        "turn thinking on or off as in training (here --thinking), or train on such responses",
    ),
)
