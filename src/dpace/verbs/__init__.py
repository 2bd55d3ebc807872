"""The verbs of the command line, one file each, with its options beside it."""
