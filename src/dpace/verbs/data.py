"""Show the data that a drafter is trained on."""

from dpace.config import Recipe
from dpace.recipes.flags import Arguments, Given, command
from dpace.verbs import load_chat

ARGUMENTS = Arguments(Recipe, groups=("prompts", "train"))


def run(recipe: Recipe, given: Given) -> None:
    """Run `dpace data`."""
    from dpace.prompts.prompts import split_and_explain
    from dpace.report.data_page import prompts_page, responses_page
    from dpace.report.tables import console
    from dpace.respond.responses import read_examples, read_meta

    path = recipe.responses_path
    parts, dropped = split_and_explain(recipe.prompts)
    console().print(prompts_page(parts, dropped))
    train = []
    if path.exists():
        (train,) = read_examples(path, [parts.train])
    if not train:
        print(f"{path} has no answers to these prompts")
        print("next:", command("respond", *given.words))
        return
    tokenizer = load_chat(recipe).tokenizer  # an example is shown as text
    console().print(responses_page(train, recipe.train.max_length, read_meta(path), tokenizer))
    print("next:", command("train", *given.words))
