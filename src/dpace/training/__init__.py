"""Train a drafter on responses: datasets and a recipe come in, a drafter's folder goes out."""
