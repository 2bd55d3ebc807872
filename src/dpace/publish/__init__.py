"""Write drafters for others: a drafter comes in, a folder for an engine with a model card goes out."""
