"""Train parallel drafters with D-PACE and decode any Hugging Face causal LM faster, with the same text."""

__version__ = "0.1.0"
