"""Speed without a change of meaning: attention, caches, fused layers, packed weights."""
