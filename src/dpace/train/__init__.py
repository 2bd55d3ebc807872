"""Training of a drafter: responses to a checkpoint."""

from dpace.train.run import train

__all__ = ["train"]
