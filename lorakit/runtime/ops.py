"""The operations of the runtime, and the only importer of `lorakit_kernels`: which backend computes an adapter's share."""

from lorakit_kernels import Stack, stacked_lora

__all__ = ["Stack", "stacked_lora"]
