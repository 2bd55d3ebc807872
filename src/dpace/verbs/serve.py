"""Answer over HTTP, as OpenAI's API does."""

import os
from functools import partial
from typing import Annotated

from dpace.config import CountOrZero, Text, integer, options
from dpace.recipes.flags import Arguments, Given
from dpace.servers.transport import API_KEY
from dpace.verbs import DecoderConfig, load_decoder

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


ARGUMENTS = Arguments(ServeConfig)


def run(config: ServeConfig, given: Given) -> None:
    """Run `dpace serve`."""
    key = config.api_key or os.environ.get(API_KEY, "")
    if config.host not in LOOPBACK and not key:
        raise ValueError(f"--host {config.host} may be reached by others, and there is no key; set {API_KEY}")
    import uvicorn

    from dpace.serving.service import Service

    service = Service(partial(load_decoder, config), config.max_waiting, key)
    uvicorn.Server(uvicorn.Config(service, config.host, config.port, access_log=False, lifespan="off")).run()
