"""Let the target answer the prompts."""

from dpace.config import Recipe
from dpace.recipes.flags import DRY_RUN, next_command, parse
from dpace.system import ranks
from dpace.system.ledger import lock_folder
from dpace.system.progress import count, note, print_text
from dpace.verbs import announce, load_chat, load_target, refuse_unreadable


def run(args: list[str]) -> None:
    """Run `dpace respond`."""
    recipe = parse(Recipe, "respond", args, groups=("prompts", "respond"))
    from dpace.plan.lines import answer_lines
    from dpace.prompts.prompts import split_prompts
    from dpace.respond.answering import answer_prompts
    from dpace.respond.responses import check_meta, known_settings
    from dpace.target.locate import find_target

    parts = split_prompts(recipe.prompts)
    path = recipe.responses_path
    find_target(recipe.target)
    prompts = [prompt for part in parts for prompt in part]

    def check_and_announce() -> None:
        check_meta(path, known_settings(recipe.respond, thinking=recipe.thinking))
        if recipe.respond.source == "target":
            refuse_unreadable(recipe, prompts, recipe.respond.max_new_tokens, args)
        announce(answer_lines(recipe, parts), args)

    if DRY_RUN in args:
        ranks.from_first(check_and_announce)
        ranks.end()
        return
    with lock_folder(recipe.output):
        ranks.from_first(check_and_announce)
        answered = sum(prompt.answer is not None for prompt in prompts)
        if recipe.respond.source == "target" and answered:
            note(f"the answers of {count(answered, 'prompt')} left out: --respond.source own would train on them")
        target = load_chat(recipe) if recipe.respond.server else load_target(recipe)
        left_out = answer_prompts(target, prompts, path, recipe.respond)
    if not ranks.end():
        return
    for reason, number in left_out.items():
        note(f"{count(number, 'prompt')} without an answer: {reason}")
    print_text(f"{count(len(prompts) - sum(left_out.values()), 'response')} in {path}")
    print_text(f"next: {next_command('train', 'respond', args)}")
