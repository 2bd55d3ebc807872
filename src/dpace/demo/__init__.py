"""The demo: its prompts, its recipe and its run."""
