"""What one launch takes. Known without Triton, so that callers without a GPU can be built on it."""

MOST_SIBLINGS = 4
"""Modules that share x."""

RANKS = 16
"""Ranks of a tile: the width of shrink's sums, `max_rank`, is a multiple of it."""
