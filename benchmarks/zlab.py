"""Check that z-lab's loop and ours give the same text and accepted lengths on held-out prompts.

    pip install --no-deps --target /tmp/dflash dflash==0.1.0
    PYTHONPATH=/tmp/dflash python benchmarks/zlab.py TARGET DRAFTER

The prompts are the demo's. Exits with 1 if any response or accepted length differs. Both loops count a verification
without the bonus token where an accepted stop token or the length limit ends it.
"""

import sys
import time

import dflash.model as zlab
import torch

from dpace.decode.loop import generate, generate_plain
from dpace.drafter import load_drafter
from dpace.prompts.prompts import demo_path, read_prompts
from dpace.target import Target
from dpace.target.chat import encode_chat

MAX_NEW_TOKENS = 128


def main(target_name: str, drafter_folder: str) -> int:
    target = Target.load(target_name)
    ours = load_drafter(drafter_folder, target, all_tokens=True)
    theirs, info = zlab.DFlashDraftModel.from_pretrained(
        drafter_folder, dtype=target.model.dtype, output_loading_info=True
    )
    theirs = theirs.to(target.device).eval()
    print("keys missing and unexpected in z-lab's class:", info["missing_keys"] or 0, info["unexpected_keys"] or 0)
    zlab._cuda_time = time.perf_counter  # its clock needs a GPU
    prompts = read_prompts(demo_path("heldout"))
    same_text = same_lengths = same_as_plain = 0
    seconds = {"ours": 0.0, "z-lab": 0.0}
    tokens = 0
    for prompt in prompts:
        token_ids = encode_chat(target, prompt.turns[0])
        mine = generate(target, ours, token_ids, max_new_tokens=MAX_NEW_TOKENS, width="full")
        inputs = torch.tensor([token_ids], device=target.device)
        other = zlab.dflash_generate(
            theirs, target.model, inputs, MAX_NEW_TOKENS, target.stop_token_ids, 0.0, return_stats=True
        )
        text = other.output_ids[0, len(token_ids) :].tolist()
        same_text += text == mine.token_ids
        lengths = list(other.acceptance_lengths)
        overflow = sum(lengths) - (len(text) - 1)  # at the length limit z-lab counts a bonus token that it then drops
        lengths[-1] -= max(0, overflow)
        same_lengths += lengths == mine.emitted_lengths
        same_as_plain += mine.token_ids == generate_plain(target, token_ids, max_new_tokens=MAX_NEW_TOKENS).token_ids
        tokens += mine.num_decode_tokens
        seconds["ours"] += mine.decode_seconds
        seconds["z-lab"] += other.time_per_output_token * other.num_output_tokens
    total = len(prompts)
    print(
        f"same text {same_text}/{total}, same accepted lengths {same_lengths}/{total}, "
        f"same as plain {same_as_plain}/{total}"
    )
    print({name: f"{tokens / value:.1f} tokens/s" for name, value in seconds.items()})
    return int(min(same_text, same_lengths, same_as_plain) < total)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
