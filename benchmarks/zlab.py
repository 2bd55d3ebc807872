"""Check that z-lab's loop and ours give the same text and accepted lengths on held-out prompts.

    pip install --no-deps --target /tmp/dflash dflash==0.1.0
    PYTHONPATH=/tmp/dflash python benchmarks/zlab.py TARGET DRAFTER

The prompts are the demo's. Exits with 1 if any response or accepted length differs. Both loops count a verification
without the bonus token where an accepted stop token or the length limit ends it.
"""

import sys
import time

import torch
import tyro
from loops import demo_questions, zlab_drafter, zlab_package

from dpace.decode import generate, generate_plain
from dpace.drafter import load_drafter
from dpace.target import Target


def main(target: tyro.conf.Positional[str], drafter: tyro.conf.Positional[str], tokens: int = 128) -> None:
    """Decode the demo's held-out prompts with both loops.

    Args:
        target: folder or Hub id.
        drafter: its folder.
        tokens: most tokens of a response.
    """
    try:
        zlab = zlab_package()
    except ImportError as error:
        sys.exit(str(error))
    loaded = Target.load(target)
    ours = load_drafter(drafter, loaded)
    ours.vocabulary = None  # engines draft any token
    theirs = zlab_drafter(drafter, loaded.model)
    zlab._cuda_time = time.perf_counter  # its clock needs a GPU
    questions = demo_questions(loaded, sys.maxsize)
    num_same = {"text": 0, "accepted lengths": 0, "text as plain": 0}
    for _, ids in questions:
        mine = generate(loaded, ours, ids, max_new_tokens=tokens, width="full")
        inputs = torch.tensor([ids], device=loaded.device)
        other = zlab.dflash_generate(
            theirs, loaded.model, inputs, tokens, loaded.stop_token_ids, 0.0, return_stats=True
        )
        text = other.output_ids[0, len(ids) :].tolist()
        lengths = list(other.acceptance_lengths)
        lengths[-1] -= max(0, sum(lengths) - (len(text) - 1))  # at the limit z-lab counts a bonus token that it drops
        num_same["text"] += text == mine.token_ids
        num_same["accepted lengths"] += lengths == mine.emitted_lengths
        num_same["text as plain"] += mine.token_ids == generate_plain(loaded, ids, max_new_tokens=tokens).token_ids
    print(f"of {len(questions)} responses, the same: {num_same}")
    sys.exit(min(num_same.values()) < len(questions))


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
