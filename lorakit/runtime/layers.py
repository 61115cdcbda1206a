"""What makes a module of the base multi-adapter: a hook on its output.

The base keeps its modules, names, weights and `state_dict`: nothing is replaced, so quantised layers, accelerate's
device maps, tied weights and `torch.compile` see the model that they know. The hook adds the adapters' share to what
the module returned; without adapters in the batch it returns at once. Knows modules and stacks; no name, no request.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import nn

from lorakit.adapters.places import place_of
from lorakit.errors import AdapterIdsError
from lorakit.runtime.ops import Stack, stacked_lora


class AdaptedModule:
    """One place of the base, with its hook.

    Attributes:
        path: the module's path.
        stacks: what the batch now in the model applies here; empty for the base alone.
    """

    def __init__(self, path: str, module: nn.Module) -> None:
        place = place_of(module)
        assert place is not None, f"{path} was exported, so it can carry an adapter"
        self.path = path
        self.stacks: tuple[Stack, ...] = ()
        self._embedding = place.kind == "embedding"
        self._module = module
        module.register_forward_hook(self._add, with_kwargs=True)

    @property
    def device(self) -> torch.device:
        """Where the module computes (not where accelerate keeps an offloaded weight)."""
        hook = getattr(self._module, "_hf_hook", None)
        execution = getattr(hook, "execution_device", None)
        if execution is not None:
            return torch.device(execution)
        return next(itertools.chain(self._module.parameters(), self._module.buffers())).device

    @property
    def output_scale(self) -> float:
        """What the module multiplies its product by: Gemma's embeddings do, and PEFT scales the adapter alike."""
        scale = getattr(self._module, "embed_scale", None)
        if not isinstance(self._module, nn.Embedding) or scale is None:
            return 1.0
        return float(torch.as_tensor(scale).to(self._module.weight.dtype))

    def _add(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], y: torch.Tensor) -> torch.Tensor:
        """Adds the adapters' share to y (..., out) for x (..., in), both row-major over the batch's rows."""
        if not self.stacks:
            return y
        x = args[0] if args else next(iter(kwargs.values()))
        lead = x.shape[0] if x.dim() > (1 if self._embedding else 2) else y.numel() // y.shape[-1]
        if lead % self.stacks[0].n:
            raise AdapterIdsError(
                f"{self.path} was given {lead} rows for {self.stacks[0].n} adapter_ids: the model does not feed it row "
                "by row, so adapters on it cannot share a batch; give all rows one adapter."
            )
        for stack in self.stacks:
            y = stacked_lora(y, x, stack, embedding=self._embedding)
        return y
