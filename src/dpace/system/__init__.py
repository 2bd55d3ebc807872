"""Files, locks, the terminal, ranks and devices."""
