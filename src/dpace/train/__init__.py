"""Train a drafter on responses."""

from dpace.train.run import train

__all__ = ["train"]
