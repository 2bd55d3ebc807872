"""Write the demo's prompts: maintenance notes to turn into a JSON ticket, and word problems as the hard contrast.

    python examples/make_demo_prompts.py src/dpace/data

Training and held-out parts draw from disjoint pools of machines, places, faults, people, numbers, objects and
sentence patterns, so that no note and no value of a held-out prompt was seen in training.
"""

import itertools
import json
import random
import sys
from pathlib import Path

INSTRUCTION = "Turn each maintenance note into a JSON ticket.\n\n"

EXAMPLES = (
    (
        "The glue gun in the studio does not heat up. Greta Holm told us on Tuesday.",
        {"machine": "glue gun", "location": "studio", "problem": "does not heat up", "reported_by": "Greta Holm", "day": "Tuesday"},
    ),
    (
        "Monday: treadmill in room 118 stops suddenly, reported by Bruno Kaya.",
        {"machine": "treadmill", "location": "room 118", "problem": "stops suddenly", "reported_by": "Bruno Kaya", "day": "Monday"},
    ),
)
"""Shown in every prompt, before the note: a small model keeps to a form that it sees."""

NOTES = {
    "train": {
        "machine": "laser printer|coffee machine|dish washer|air conditioner|water pump|conveyor belt|label printer|floor scanner|"
        "ice maker|packing robot|ticket gate|lathe|drill press|steam iron|paper shredder|heat exchanger|bread oven|"
        "card reader|projector|forklift|band saw|water heater|vacuum cleaner|milling machine|bottle washer|hoist|"
        "sewing machine|cash register|wall clock|smoke detector",
        "location": "the kitchen|the workshop|the reception|the canteen|the loading dock|the first floor|the main hall|"
        "the east wing|the laundry|the print shop|the server room|the cold store|the entrance|the paint shop|"
        "the library|room 12|room 204|room 36|room 48|hall 2|hall 6|bay 8|line 4|office 60",
        "problem": "does not start|makes a loud noise|leaks oil|smells of smoke|stops after a few minutes|shows an error code|"
        "is too hot|jams all the time|lost its power|vibrates a lot|drips water|has a broken switch|does not close|"
        "runs too slowly|has a loose cable|blinks red|needs a new filter|has a cracked cover|trips the fuse|will not turn off",
        "person": "Nora Lind|Ivan Petrov|Maria Costa|Tom Baker|Aisha Khan|Peter Lund|Chen Wei|Laura Rossi|Omar Haddad|"
        "Julia Novak|Sam Carter|Ingrid Olsen|David Cohen|Priya Nair|Lucas Martin|Hanna Virtanen|Jose Alvarez|"
        "Emma Fischer|Kenji Sato|Olga Ivanova|Ben Wright|Fatima Zahra|Marco Bianchi|Sofia Lopez",
        "day": "Monday|Tuesday|Thursday|Saturday",
        "pattern": "The {machine} in {location} {problem}. {person} told us on {day}.|"
        "{person} called on {day}: the {machine} in {location} {problem}.|"
        "{day}: {machine} in {location} {problem}, reported by {person}.|"
        "On {day} {person} wrote that the {machine} in {location} {problem}.|"
        "Please check the {machine} in {location}. It {problem}. Reported by {person} on {day}.|"
        "Since {day} the {machine} in {location} {problem}, says {person}.|"
        "{person} from {location} reports on {day} that the {machine} {problem}.|"
        "The {machine} {problem} again. It is in {location}. Seen by {person} on {day}.",
    },
    "heldout": {
        "machine": "elevator|barcode scanner|freezer|compressor|photocopier|grinder|boiler|welding robot|ventilation fan|hand dryer",
        "location": "the basement|the warehouse|the garage|the second floor|the attic|room 315|room 71|hall 9|the pharmacy",
        "problem": "rattles badly|does not cool|has a torn belt|keeps beeping|leaks gas|has a dead screen|is stuck|loses pressure",
        "person": "Anna Berg|Paul Meyer|Rita Gomez|Yusuf Demir|Clara Jensen|Viktor Horvat|Mina Park|Alan Reed|Elsa Dubois",
        "day": "Wednesday|Friday|Sunday",
        "pattern": "{person} noticed on {day} that the {machine} in {location} {problem}.|"
        "Problem on {day}: the {machine} in {location} {problem}. Contact: {person}.|"
        "We had a message from {person} on {day}. The {machine} in {location} {problem}.|"
        "The {machine} of {location} {problem} since {day}, according to {person}.",
    },
}

PROBLEMS = {
    "train": {
        "name": "Nina|Oscar|Leah|Hugo|Tara|Felix|Zoe|Adam|Mila|Ravi|Ella|Noah",
        "thing": "pencils|apples|stamps|marbles|buttons|tickets|cookies|stickers|shells|candles",
        "pattern": "{name} has {a} {thing} and buys {b} more. How many {thing} does {name} have now?|"
        "{name} packs {a} boxes with {b} {thing} in each. How many {thing} are there in all?|"
        "{name} had {c} {thing} and gave away {b}. How many {thing} are left?|"
        "Each bag holds {b} {thing}. {name} fills {a} bags and has {d} {thing} left over. How many {thing} were there?|"
        "{name} sells {a} {thing} for {d} dollars each. How much money does {name} get?|"
        "{name} shares {c} {thing} equally among {d} friends. How many does each friend get?",
    },
    "heldout": {
        "name": "Iris|Jonas|Wanda|Theo|Pia|Quinn",
        "thing": "postcards|lemons|feathers|magnets|ribbons",
        "pattern": "On {b} days {name} finds {a} {thing} a day. How many {thing} is that together?|"
        "{name} needs {c} {thing} but only owns {a}. How many are missing?|"
        "{name} pays {d} dollars for each of {b} {thing} and then sells all of them for {c} dollars. What is the profit?",
    },
}

COUNTS = {("notes", "train"): 320, ("notes", "heldout"): 24, ("problems", "train"): 80, ("problems", "heldout"): 12}


def pick(pools, rng):
    """One value of every pool."""
    return {name: rng.choice(values.split("|")) for name, values in pools.items()}


def numbers(part, rng):
    """Even numbers for training, odd ones for the held-out part; `c` is larger than the others."""
    shift = 0 if part == "train" else 1
    small = [2 * n + shift for n in range(2, 12)]
    a, b, d = rng.sample(small, 3)
    return {"a": a, "b": b, "d": d, "c": 2 * rng.randrange(40, 90) + shift}


def note_messages(note):
    """The conversation that ends with a note, after the worked examples."""
    messages = []
    for example, ticket in EXAMPLES:
        ticket = json.dumps({**ticket, "status": "open"}, indent=2)
        messages += [{"role": "user", "content": example}, {"role": "assistant", "content": ticket}]
    messages[0]["content"] = INSTRUCTION + messages[0]["content"]
    return [*messages, {"role": "user", "content": note}]


def make(kind, part):
    """Distinct prompts of one kind and part."""
    rng = random.Random(f"{kind}/{part}")
    seen = set()
    pools = (NOTES if kind == "notes" else PROBLEMS)[part]
    for count in itertools.count():
        if len(seen) == COUNTS[kind, part]:
            return
        values = pick(pools, rng)
        text = values.pop("pattern").format(**values, **numbers(part, rng))
        text = text[0].upper() + text[1:]
        if text not in seen:
            seen.add(text)
            messages = note_messages(text) if kind == "notes" else [{"role": "user", "content": text}]
            yield {"id": f"{kind}/{part}/{len(seen)}", "set": kind, "messages": messages}
        if count > 100 * COUNTS[kind, part]:
            raise RuntimeError(f"the pools of {kind}/{part} are too small for {COUNTS[kind, part]} prompts")


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    for part in ("train", "heldout"):
        rows = [row for kind in ("notes", "problems") for row in make(kind, part)]
        random.Random(part).shuffle(rows)
        (folder / f"demo_{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
