"""Train parallel drafters with D-PACE and decode Hugging Face causal LMs faster, with the same text."""

__version__ = "0.1.0"
