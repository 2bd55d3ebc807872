"""Answer over HTTP, as OpenAI's API does."""

import os
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from dpace.config import CountOrZero, Positive, Text, integer, options
from dpace.recipes.flags import Arguments, Given
from dpace.servers.transport import API_KEY
from dpace.system.progress import note
from dpace.verbs import DecoderConfig, load_decoder

if TYPE_CHECKING:
    from dpace.serving.learner import Learner
    from dpace.target import Target

LOOPBACK = ("127.0.0.1", "::1", "localhost")
"""Hosts that only this machine reaches."""


@options
class ServeConfig(DecoderConfig):
    """Answer over HTTP, as OpenAI's API does: /v1/chat/completions and /v1/completions.

    One request is answered at a time, and the others wait in line. SIGTERM lets those that are there end.
    """

    host: Text = "127.0.0.1"
    """Address to listen at; one that other machines reach needs a key."""
    port: Annotated[int, integer(1, 65535)] = 8000
    """Port to listen at."""
    api_key: Text | None = None
    """Key that requests must bring; by default the environment variable DPACE_API_KEY has it, or none is asked for."""
    max_waiting: CountOrZero = 32
    """Requests that may wait while one is answered; more are refused with the status 429."""
    learn: Text | None = None
    """Folder to keep the answers to chats in, and to train drafters on them while nothing is asked.
    The last drafter that it learned is used in place of --drafter. A request with `store: false` is not kept."""
    learn_mib: Positive = 64.0
    """With --learn: most MiB of answers; the oldest ones go first."""


ARGUMENTS = Arguments(ServeConfig)
STEPS = 100
"""Steps of a round of learning."""


def run(config: ServeConfig, given: Given) -> None:
    """Run `dpace serve`."""
    key = config.api_key or os.environ.get(API_KEY, "")
    if config.host not in LOOPBACK and not key:
        raise ValueError(f"--host {config.host} may be reached by others, and there is no key; set {API_KEY}")
    import uvicorn

    if config.learn:
        from dpace.serving.learner import find_taken

        os.umask(0o077)  # what people ask is for nobody else's eyes
        if taken := find_taken(config.learn):
            note(f"drafting with {taken}, the last drafter that was learned")
            config = replace(config, drafter=taken)
    from dpace.serving.service import Service

    service = Service(partial(load_decoder, config), config.max_waiting, key)
    if config.learn:
        service.learner = make_learner(config, service.decoder.target)
    try:
        uvicorn.Server(uvicorn.Config(service, config.host, config.port, access_log=False, lifespan="off")).run()
    finally:
        if service.learner:
            service.learner.close()


def make_learner(config: ServeConfig, target: "Target") -> "Learner":
    """Make what keeps answers and learns from them, as the recipe `laptop` does."""
    from dpace.recipes import RECIPES
    from dpace.recipes.recipe_file import read_recipe
    from dpace.serving.learner import PROMPTS, Learner, with_drafter

    assert config.learn is not None
    folder = Path(config.learn)
    recipe = read_recipe(RECIPES["laptop"])
    path, heldout_path = (str(folder / name) for name in PROMPTS)
    recipe = replace(
        recipe,
        target=config.target,
        dtype=config.dtype,
        device_map=config.device_map,
        thinking=config.thinking,
        output=str(folder),
        # Their replies are the answers that were given.
        prompts=replace(recipe.prompts, path=path, heldout_path=heldout_path, num_validation=0),
        respond=replace(recipe.respond, source="own"),
        train=replace(recipe.train, max_steps=STEPS, eval_steps=STEPS),
    )
    return Learner(with_drafter(recipe, config.drafter), config.learn_mib, target)
