"""Accepted lengths, speed and losslessness, measured."""
