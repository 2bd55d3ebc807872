"""Let the target answer the prompts."""

from dpace.config import Recipe
from dpace.recipes.flags import Arguments, Given, command
from dpace.system import ranks
from dpace.system.ledger import lock_folder
from dpace.system.progress import count, note, print_text
from dpace.verbs import load_chat, load_target

ARGUMENTS = Arguments(Recipe, groups=("prompts", "respond"))


def run(recipe: Recipe, given: Given) -> None:
    """Run `dpace respond`."""
    from dpace.plan import answer_lines
    from dpace.prompts.prompts import split_prompts
    from dpace.respond.answering import answer_prompts
    from dpace.respond.responses import check_meta, known_settings

    config = recipe.respond
    path = recipe.responses_path
    parts = split_prompts(recipe.prompts)
    prompts = [*parts.train, *parts.validation, *parts.heldout]

    def check() -> list[str]:
        """Refuse what can be refused without the target, and say what is to come."""
        check_meta(path, known_settings(config, thinking=recipe.thinking))
        return answer_lines(recipe, parts)

    with lock_folder(recipe.output):
        lines = ranks.from_first(check)
        target = load_chat(recipe) if config.server else load_target(recipe)
        note("\n".join(lines))
        left_out = answer_prompts(target, prompts, path, config)
    if not ranks.end():
        return
    for reason, num_left_out in left_out.items():
        note(f"{count(num_left_out, 'prompt')} without an answer: {reason}")
    print_text(f"{count(len(prompts) - sum(left_out.values()), 'response')} in {path}")
    print_text(f"next: {command('train', *given.words)}")
