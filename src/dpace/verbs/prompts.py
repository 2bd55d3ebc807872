"""Let the target write prompts."""

from dpace.config import PromptsWriterConfig
from dpace.recipes.flags import Arguments, Given, command
from dpace.system.progress import count
from dpace.verbs import load_target

ARGUMENTS = Arguments(PromptsWriterConfig)


def run(config: PromptsWriterConfig, given: Given) -> None:
    """Run `dpace prompts`."""
    from dpace.respond.prompt_writer import write_prompts

    path, num_prompts = write_prompts(load_target(config), config)
    print(f"{count(num_prompts, 'prompt')} in {path}")
    print("next:", command("respond", "--target", config.target, "--prompts.path", str(path)))
