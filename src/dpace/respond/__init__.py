"""The target's answers to prompts, in process and by servers."""
