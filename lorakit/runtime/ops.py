"""The runtime's operations: which backend computes the adapters' share. The only importer of `lorakit_kernels`."""

from lorakit_kernels import Stack, stacked_lora

__all__ = ["Stack", "stacked_lora"]
