"""Is width `auto` faster with the validity head or with the calibrated softmax?

    dpace train recipe.yaml --loss.validity stopped
    python benchmarks/confidence.py TARGET DRAFTER [--prompts 20]

Both decode the same prompts of the demo with the same drafter, in turn, and share the measured costs of steps. Prints
tokens a second, the ratio with a 95 % interval over prompts, and reliability by slot from the drafter's provenance.
"""

import argparse
import json
from itertools import islice
from pathlib import Path

import numpy as np
from make_prompts import make

from dpace.decode import Paces, generate
from dpace.decode.costs import StepCosts, measure_costs
from dpace.decode.pace import Pace
from dpace.drafter import load_drafter
from dpace.metrics import decode_speedup
from dpace.target import Target
from dpace.target.chat import encode_chat
from dpace.target.locate import find_target

WAYS = ("softmax", "validity")


class OnePace(Paces):
    """The pace of one drafter, with costs that were measured once for all."""

    def __init__(self, costs: StepCosts):
        super().__init__()
        self.pace = Pace(costs)

    def get(self, target, drafter, temperature=0.0) -> Pace:
        """Give the pace."""
        return self.pace


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target")
    parser.add_argument("drafter", type=Path)
    parser.add_argument("--prompts", type=int, default=20, help="of each set")
    parser.add_argument("--max-new-tokens", type=int, default=96)
    args = parser.parse_args()
    target = Target.load(find_target(args.target))
    drafters = {name: load_drafter(args.drafter, target, confidence=name) for name in WAYS}
    costs = measure_costs(target, drafters["softmax"])
    paces = {name: OnePace(costs) for name in WAYS}
    print("| set | softmax, tokens/s | validity, tokens/s | ratio |\n|---|---|---|---|")
    for kind in ("notes", "problems"):
        rows = list(islice(make(kind, "heldout"), args.prompts + 1))
        tokens, seconds = (np.zeros((args.prompts, 2)) for _ in range(2))
        for number, row in enumerate(rows):
            ids = encode_chat(target, row["messages"])
            for way in range(2):
                name = WAYS[(way + number) % 2]
                options = {"max_new_tokens": args.max_new_tokens, "paces": paces[name]}
                found = generate(target, drafters[name], ids, **options)
                if number:  # the first one warms up
                    place = number - 1, WAYS.index(name)
                    tokens[place], seconds[place] = found.num_decode_tokens, found.decode_seconds
        speeds = tokens.sum(0) / seconds.sum(0)
        value, low, high = decode_speedup(tokens[:, 1], seconds[:, 1], tokens[:, 0], seconds[:, 0])
        print(f"| {kind} | {speeds[0]:.1f} | {speeds[1]:.1f} | {value:.3f} [{low:.3f}, {high:.3f}] |")
    print("\n| slot | accepted | softmax | Brier | validity | Brier |\n|---|---|---|---|---|---|")
    for row in json.loads((args.drafter / "provenance.json").read_text())["reliability"]:
        values = (row[name] for name in ("accepted", "softmax", "softmax_brier", "validity", "validity_brier"))
        print(f"| {row['slot']} | " + " | ".join(f"{value:.3f}" for value in values) + " |")


if __name__ == "__main__":
    main()
