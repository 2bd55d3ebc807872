"""Prompts, the target's answers to them, and the dataset of blocks."""
