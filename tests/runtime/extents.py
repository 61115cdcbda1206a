"""Random adapters as extents, small ones of many ranks."""

import torch

from lorakit.adapters.form import AdapterForm, ModuleForm
from lorakit.adapters.layout import Extent
from lorakit.runtime.host_cache import ExtentReader


def extent_of(seed=0, *, rank=4, width=24, layers=2, dtype=torch.float32, vectors=True):
    """An adapter with A and B in every layer, and with c and d in every other."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    modules = {
        f"layers.{layer}.proj": ModuleForm(
            "linear",
            width,
            width + 3,
            a=normal(rank, width).to(dtype),
            b=normal(width + 3, rank).to(dtype),
            scale=0.5 + layer,
            c=normal(width + 3) if vectors and layer % 2 else None,
            d=normal(width + 3) if vectors and layer % 2 else None,
        )
        for layer in range(layers)
    }
    return Extent.of_form(AdapterForm("dora", modules, {}))


def bytes_of(extent, dtype=None):
    """The flat buffer that an extent is on the device: weights in `dtype`, then vectors."""
    weights = extent.weights.to(dtype or extent.dtype)
    return torch.cat([weights.view(torch.uint8), extent.vectors.view(torch.uint8)])


def reader_of(extent, calls=None):
    """Reads an extent as a bank does, and notes the buffers that it was given."""

    def read_into(buffer):
        if calls is not None:
            calls.append(buffer)
        content = bytes_of(extent)
        buffer[: content.numel()] = content
        return Extent.of_bytes(extent.layout, extent.dtype, buffer)

    return ExtentReader(extent.layout, extent.dtype, read_into)
