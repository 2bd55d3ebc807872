"""Prompts: files, public sets, formats and overlaps."""
