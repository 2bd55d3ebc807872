"""Decode a prompt with the drafter that `dpace demo` trained.

python examples/decode.py dpace-demo/dpace/seed-42 demo#notes/heldout/1
"""

import sys

from dpace import Target, encode_chat, generate, generate_plain, load_drafter
from dpace.prompts.prompts import find_prompt
from dpace.target.locate import TARGET_ID

target = Target.load(TARGET_ID)
drafter = load_drafter(sys.argv[1], target)
token_ids = encode_chat(target, find_prompt(sys.argv[2]))
plain = generate_plain(target, token_ids, max_new_tokens=100)
ours = generate(target, drafter, token_ids, max_new_tokens=100)
print(target.tokenizer.decode(ours.token_ids, skip_special_tokens=True))
print(f"same text: {ours.token_ids == plain.token_ids}")
print(f"tau {ours.acceptance.tau:.2f}, with {ours.num_copied} tokens that were copied from the text before")
print(f"{plain.decode_seconds:.2f} s without a drafter, {ours.decode_seconds:.2f} s with it")
