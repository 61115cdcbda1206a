"""Segmented low-rank products: many adapters on one batch.

A kernel package of its own: it knows tensors alone, and nothing of lorakit, PEFT or transformers.
"""

from lorakit_kernels.stacked import Stack, stacked_lora

__all__ = ["Stack", "stacked_lora"]
