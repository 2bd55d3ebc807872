"""Write the demo's prompts: maintenance notes to turn into JSON tickets, and word problems.

    python benchmarks/make_prompts.py FOLDER PART...

writes `FOLDER/PART.jsonl` for each part: `train`, `heldout` (the files of `src/dpace/studies`) or `tuning`.

Training and held-out parts draw from disjoint pools of machines, places, faults, names, numbers, objects and sentence
patterns, so no note and no value of a held-out prompt is in the training part. The tuning part has other prompts from
the held-out pools: the demo's settings were first found on it, so that nothing was chosen on the held-out part.
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
        {
            "machine": "glue gun",
            "location": "studio",
            "problem": "does not heat up",
            "reported_by": "Greta Holm",
            "day": "Tuesday",
        },
    ),
    (
        "Monday: treadmill in room 118 stops suddenly, reported by Bruno Kaya.",
        {
            "machine": "treadmill",
            "location": "room 118",
            "problem": "stops suddenly",
            "reported_by": "Bruno Kaya",
            "day": "Monday",
        },
    ),
)
"""Shown in every prompt, before the note: a small model keeps to a form that it sees."""

NOTES = {
    "train": {
        "machine": "laser printer|coffee machine|dish washer|air conditioner|water pump|conveyor belt|"
        "label printer|floor scanner|"
        "ice maker|packing robot|ticket gate|lathe|drill press|steam iron|paper shredder|heat exchanger|bread oven|"
        "card reader|projector|forklift|band saw|water heater|vacuum cleaner|milling machine|bottle washer|hoist|"
        "sewing machine|cash register|wall clock|smoke detector|sliding door|street lamp|fuel tank|gas meter|hay baler|"
        "leaf blower|wood chipper|snow plough|cement mixer|spray booth|pallet jack|tower crane|belt sander|microscope|"
        "centrifuge|oscilloscope|dough mixer|meat slicer|rice cooker|milk frother|juice press|popcorn maker|hot plate|"
        "fog machine|stage light|drum kit|loudspeaker|radio mast|satellite dish|parking meter|bus shelter|car wash|"
        "tyre changer|battery charger|solar panel|wind turbine|diesel generator|fire alarm|window blind|revolving door",
        "location": "the kitchen|the workshop|the reception|the canteen|the loading dock|the first floor|the main hall|"
        "the east corridor|the laundry|the print shop|the server room|the cold store|the entrance|"
        "the paint shop|the library|"
        "the stable|the greenhouse|the harbour|the gym|the chapel|the theatre|the bakery|"
        "the museum|the archive|the courtyard|"
        "the swimming pool|the boardroom|the cinema|the tunnel|the foundry|room {n}|hall {n}|"
        "bay {n}|line {n}|office {n}|dock {n}",
        "problem": "does not start|makes a loud noise|leaks oil|smells of smoke|stops after a few minutes|"
        "shows an error code|"
        "is too hot|jams all the time|lost its power|vibrates a lot|drips water|has a broken switch|does not close|"
        "runs too slowly|has a loose cable|blinks red|needs a new filter|has a cracked cover|"
        "trips the fuse|will not turn off|"
        "is out of grease|hums at night|has a bent axle|needs new batteries|is covered in rust|"
        "cannot be locked|misses a screw|"
        "burns the edges|has a flat tyre|spills coolant|reads the wrong value|has a worn brake|shakes at full speed|"
        "is blocked by dust|lost its label|draws too much current|has a clogged nozzle|"
        "does not respond|makes black smoke|"
        "has a scratched lens",
        "first": "Nora|Ivan|Maria|Tom|Aisha|Peter|Chen|Laura|Omar|Julia|Sam|Ingrid|David|Priya|Lucas|Hanna|"
        "Jose|Emma|Kenji|Olga|"
        "Ben|Fatima|Marco|Sofia|Erik|Leila|Simon|Tanya|Victor|Grace|Diego|Amina|Frank|Helena|Raj|"
        "Monica|Stefan|Linda|Carlos|Ruth",
        "last": "Lind|Petrov|Costa|Baker|Khan|Lund|Wei|Rossi|Haddad|Novak|Carter|Olsen|Cohen|Nair|Martin|"
        "Virtanen|Alvarez|Fischer|"
        "Sato|Ivanova|Wright|Zahra|Bianchi|Lopez|Hansen|Mendez|Foster|Keller|Moreau|Tanaka|"
        "Svensson|Okafor|Murphy|Silva|"
        "Popescu|Walker|Nielsen|Garcia|Weber|Adams",
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
        "machine": "elevator|barcode scanner|freezer|compressor|photocopier|grinder|boiler|welding robot|"
        "ventilation fan|hand dryer|"
        "garage door|metal detector|lawn mower|espresso maker",
        "location": "the basement|the warehouse|the garage|the second floor|the attic|the pharmacy|"
        "the cafeteria|lab {n}|shed {n}",
        "problem": "rattles badly|does not cool|has a torn belt|keeps beeping|leaks gas|has a dead screen|"
        "is stuck|loses pressure|"
        "needs a new fan|will not open",
        "first": "Anna|Paul|Rita|Yusuf|Clara|Viktor|Mina|Alan|Elsa|Hugo",
        "last": "Berg|Meyer|Gomez|Demir|Jensen|Horvat|Park|Reed|Dubois|Stone",
        "day": "Wednesday|Friday|Sunday",
        "pattern": "{person} noticed on {day} that the {machine} in {location} {problem}.|"
        "Problem on {day}: the {machine} in {location} {problem}. Contact: {person}.|"
        "We had a message from {person} on {day}. The {machine} in {location} {problem}.|"
        "The {machine} of {location} {problem} since {day}, according to {person}.",
    },
}

PROBLEMS = {
    "train": {
        "name": "Nina|Oscar|Leah|Hector|Tara|Felix|Zoe|Adam|Mila|Ravi|Ella|Noah",
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
        "{name} pays {d} dollars for each of {b} {thing} and then sells all of them for {c} "
        "dollars. What is the profit?",
    },
}

COUNTS = {
    ("notes", "train"): 180,
    ("notes", "heldout"): 60,
    ("notes", "tuning"): 24,
    ("problems", "train"): 40,
    ("problems", "heldout"): 40,
    ("problems", "tuning"): 8,
}
SEEDS = {"train": "train", "heldout": "test", "tuning": "heldout"}
"""What seeds the draw of each part; changing one changes the prompts."""


def pick(pools, rng):
    """Choose one value of each pool."""
    return {name: rng.choice(values.split("|")) for name, values in pools.items()}


def numbers(part, rng):
    """Draw even numbers for training, odd ones for the held-out part; `c` is larger than the others."""
    shift = 0 if part == "train" else 1
    small = [2 * n + shift for n in range(2, 12)]
    a, b, d = rng.sample(small, 3)
    return {"a": a, "b": b, "d": d, "c": 2 * rng.randrange(40, 90) + shift}


def note(pools, part, rng):
    """Write a maintenance note."""
    values = pick(pools, rng)
    place = values.pop("location").format(n=2 * rng.randrange(100, 250) + (part != "train"))
    person = f"{values.pop('first')} {values.pop('last')}"
    return values.pop("pattern").format(**values, location=place, person=person)


def problem(pools, part, rng):
    """Write a word problem."""
    values = pick(pools, rng)
    return values.pop("pattern").format(**values, **numbers(part, rng))


def note_messages(note):
    """Make the conversation that ends with a note, after the worked examples."""
    messages = []
    for example, ticket in EXAMPLES:
        ticket = json.dumps({**ticket, "status": "open"}, indent=2)
        messages += [{"role": "user", "content": example}, {"role": "assistant", "content": ticket}]
    messages[0]["content"] = INSTRUCTION + messages[0]["content"]
    return [*messages, {"role": "user", "content": note}]


def make(kind, part, count=None):
    """Yield distinct prompts of one kind and part: as many as the demo has, or the first of a longer list."""
    count = count or COUNTS[kind, part]
    rng = random.Random(f"{kind}/{SEEDS[part]}")
    pools = (NOTES if kind == "notes" else PROBLEMS)["train" if part == "train" else "heldout"]
    tuned_on = {row["messages"][-1]["content"] for row in make(kind, "tuning")} if part == "heldout" else set()
    seen = set()
    for tries in itertools.count():
        if len(seen) == count:
            return
        text = (note if kind == "notes" else problem)(pools, part, rng)
        text = text[0].upper() + text[1:]
        if text not in seen | tuned_on:
            seen.add(text)
            messages = note_messages(text) if kind == "notes" else [{"role": "user", "content": text}]
            yield {"id": f"{kind}/{part}/{len(seen)}", "set": kind, "messages": messages}
        if tries > 100 * count:
            raise RuntimeError(f"the pools of {kind}/{part} are too small for {count} prompts")


def main(arguments):
    """Write the parts named after the folder."""
    if len(arguments) < 2 or not set(arguments[1:]) <= set(SEEDS):
        sys.exit("usage: python benchmarks/make_prompts.py FOLDER PART...; a part is train, heldout or tuning")
    folder, *parts = arguments
    Path(folder).mkdir(parents=True, exist_ok=True)
    for part in parts:
        rows = [row for kind in ("notes", "problems") for row in make(kind, part)]
        random.Random(SEEDS[part]).shuffle(rows)
        (Path(folder) / f"{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    main(sys.argv[1:])
