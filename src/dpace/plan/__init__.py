"""What a run will take, said before it starts: prompts, steps, memory, disk and time."""
