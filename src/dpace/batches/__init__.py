"""What a training step reads: conversations, their features, and batches of blocks."""
