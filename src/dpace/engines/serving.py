"""How each engine counts the tokens of a block, and the command that serves a drafter with it."""

import json

from dpace.config import Engine


def serve_command(engine: Engine, drafter: str, target: str, block_size: int) -> str:
    """What to type, or to write in Python, so that an engine drafts whole blocks: each counts the slots of a block in its own way.

    Source: the engines' own documentation; docs/engines.md says which were run.
    """
    drafts = block_size - 1
    gguf = drafter if drafter.endswith(".gguf") else "DRAFTER.gguf"
    speculative = json.dumps({"method": "dflash", "model": drafter, "num_speculative_tokens": drafts})
    return {
        "vllm": f"vllm serve {target} --speculative-config '{speculative}'",
        "sglang": f"python -m sglang.launch_server --model-path {target} --speculative-algorithm DFLASH "
        f"--speculative-draft-model-path {drafter} --speculative-dflash-block-size {block_size}",
        "llamacpp": f"llama-server -m TARGET.gguf -md {gguf} --spec-type draft-dflash --spec-draft-n-max {drafts}",
        "transformers": f"model.generate(**inputs, assistant_model=Drafter.from_pretrained({drafter!r}), "
        'speculation_type="dflash", do_sample=False)',
        "zlab": f"dflash_generate(DFlashDraftModel.from_pretrained({drafter!r}), model, token_ids, max_new_tokens, "
        "stop_token_ids, 0.0)",
    }[engine]
