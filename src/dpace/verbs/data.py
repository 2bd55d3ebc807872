"""Show the data that a drafter is trained on."""

from dpace.config import Recipe
from dpace.recipes.flags import next_command, parse
from dpace.verbs import load_chat


def run(args: list[str]) -> None:
    """Run `dpace data`."""
    recipe = parse(Recipe, "data", args, groups=("prompts", "train"))
    from dpace.prompts.prompts import split_and_explain
    from dpace.report.data_page import prompts_page, responses_page
    from dpace.report.tables import console
    from dpace.respond.responses import read_examples, read_meta

    path = recipe.responses_path
    parts, dropped = split_and_explain(recipe.prompts)
    console().print(prompts_page(parts, dropped))
    train = read_examples(path, parts[:1])[0] if path.exists() else None
    if not train:
        print(f"{path} has no answers to these prompts")
        print("next:", next_command("respond", "data", args))
        return
    tokenizer = load_chat(recipe).tokenizer
    console().print(responses_page(train, recipe.train.max_length, read_meta(path), tokenizer))
    print("next:", next_command("train", "data", args))
