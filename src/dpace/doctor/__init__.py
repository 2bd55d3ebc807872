"""Checks of a drafter's folder."""
