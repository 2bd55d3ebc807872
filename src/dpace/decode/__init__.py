"""Speculative decoding that keeps the target's text: draft, verify, accept, emit."""

from dpace.decode.batch import Decoder, generate_batch
from dpace.decode.generation import Generation
from dpace.decode.loop import custom_generate, generate, generate_plain, stream
from dpace.decode.pace import Paces
