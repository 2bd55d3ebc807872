"""Running servers of other engines: one prompt to them, one answer back."""
