"""Faster attention, caches, layers and linear layers that compute the same results."""
