"""From prompts to a drafter in Python, with a custom objective.

python examples/train.py recipe.yaml
"""

import sys
from pathlib import Path

from objective import weigh

import dpace

recipe = dpace.read_recipe(sys.argv[1])
target = dpace.Target.load(recipe.target)
parts = dpace.split_prompts(recipe.prompts)
path = Path(recipe.output) / "responses.jsonl"
answers = {r.id: r for r in dpace.write_responses(target, [*parts.train, *parts.validation], path, recipe.respond)}
answered, validation = ([answers[prompt.id] for prompt in part if prompt.id in answers] for part in parts[:2])
datasets = dpace.make_datasets(target, answered, validation, recipe)
drafter = dpace.train(target, *datasets, recipe, Path(recipe.output) / "drafter", weigh=weigh)
token_ids = dpace.encode_chat(target, parts.heldout[0].turns[0])
generation = dpace.generate(target, drafter, token_ids, max_new_tokens=64, width="full")
print(target.tokenizer.decode(generation.token_ids, skip_special_tokens=True))
print(f"tau {generation.acceptance.tau:.2f}")
