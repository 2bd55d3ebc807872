"""Recipes that come with dpace; their names stand for their files on the command line."""

from pathlib import Path

RECIPES = {path.stem: path for path in sorted(Path(__file__).parent.glob("*.yaml"))}
"""File of each recipe, by name."""
