"""Count the operations and waits of a decoding step, and those of the loops of z-lab and transformers.

    python -m benchmarks.operations

On a second device in plain Python (`tests/support/second_device.py`): a random target of 36 layers and a drafter of 5
decode the same prompt in bf16, in whole blocks. Views are not counted; a norm of torch and an attention count as one
operation each, as a GPU has a kernel for both. Prints the operations and waits of a step.
"""

import copy
import tempfile
import time
from types import SimpleNamespace

import torch
from transformers import AutoModel

from tests.support.second_device import NAME, SecondDevice, count_steps, load, register

PROMPT = [5, 6, 7, 8, 9]


def others_loops(target, token_ids: list[int], num_layers: int) -> dict:
    """The loops of z-lab and transformers, on layers as transformers has them, with a random drafter of their own."""
    import dflash.model as zlab

    from tests.conftest import make_drafter

    model = copy.deepcopy(target.model).bfloat16()
    model.config._attn_implementation = "sdpa"
    model = model.to(NAME)
    prompt = torch.tensor([token_ids], device=NAME)
    zlab._cuda_time = time.perf_counter
    with tempfile.TemporaryDirectory() as folder:
        make_drafter(target, num_layers=num_layers).save_pretrained(folder)
        options = {"dtype": torch.bfloat16}
        theirs = zlab.DFlashDraftModel.from_pretrained(folder, **options).eval().to(NAME)
        assistant = AutoModel.from_pretrained(folder, trust_remote_code=True, **options).eval().to(NAME)

    def run_zlab(max_new_tokens, stop_token_ids):
        found = zlab.dflash_generate(theirs, model, prompt, max_new_tokens, None, 0.0, return_stats=True)
        return [SimpleNamespace(accepted_lengths=found.acceptance_lengths)]

    def run_transformers(max_new_tokens, stop_token_ids):
        passes = []
        hook = model.register_forward_hook(lambda *_: passes.append(1))
        options = {"assistant_model": assistant, "speculation_type": "dflash", "do_sample": False}
        options |= {"attention_mask": torch.ones_like(prompt), "eos_token_id": -1}
        try:
            model.generate(prompt, max_new_tokens=max_new_tokens, **options)
        finally:
            hook.remove()
        return [SimpleNamespace(accepted_lengths=passes[1:])]

    return {"z-lab": run_zlab, "transformers": run_transformers}


def main() -> None:
    register()
    torch.inference_mode = torch.no_grad  # which counts versions, as wrapped tensors need
    import dpace.target.probe
    from dpace.decode import generate
    from dpace.target import Target
    from tests.conftest import make_drafter, make_target

    dpace.target.probe._refuse_quantized_tables = lambda *_: None  # takes a tensor of another class for a quantized one
    deep = make_target("qwen3", num_hidden_layers=36, layer_types=36 * ["full_attention"])
    with SecondDevice() as device:
        fast = Target(load(deep.model, torch.bfloat16)), load(make_drafter(deep, num_layers=5), torch.bfloat16)
        loops = {"dpace": lambda **n: [generate(*fast, PROMPT, width="full", **n)], **others_loops(deep, PROMPT, 5)}
        for name, loop in loops.items():
            found = count_steps(device, loop)
            waits = sum(found["waits"].values()) / found["steps"]
            print(f"{name}: {sum(found['operations'].values()):.0f} operations and {waits:.1f} waits a step")


if __name__ == "__main__":
    main()
