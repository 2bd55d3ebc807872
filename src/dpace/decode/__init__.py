"""Speculative decoding that keeps the target's text: draft, verify, accept, emit."""

from dpace.decode.batch import Decoder, generate_batch
from dpace.decode.generation import Generation
from dpace.decode.loop import generate, generate_plain
from dpace.decode.pace import Paces
from dpace.decode.streaming import custom_generate, stream

__all__ = [
    "Decoder",
    "Generation",
    "Paces",
    "custom_generate",
    "generate",
    "generate_batch",
    "generate_plain",
    "stream",
]
