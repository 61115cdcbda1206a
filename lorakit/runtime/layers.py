"""What makes a module of the base multi-adapter: a hook on its output.

The base keeps its modules, names, weights and `state_dict`: nothing is replaced, so quantised layers, accelerate's
device maps, tied weights and `torch.compile` see the model that they know. The hook adds the adapters' share to what
the module returned; without adapters in the batch it returns at once. Where siblings are served together, the module's
forward is taken over as well (`siblings.py`). Knows modules and a batch; no name, no request.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Any, Protocol, TypeGuard

import torch
from torch import nn

from lorakit.adapters.form import Kind
from lorakit.adapters.places import place_of
from lorakit.errors import AdapterIdsError

if TYPE_CHECKING:
    from lorakit.runtime.rows import Rows
    from lorakit.runtime.vocabulary import AddedTokens


class Batch(Protocol):
    """The adapters of the batch that is now in the model."""

    @property
    def rows(self) -> Rows:
        """The rows, and the slot of each."""

    @property
    def paths(self) -> Collection[str]:
        """The modules that some row's adapter touches."""

    @property
    def added(self) -> AddedTokens:
        """The tokens that adapters add to the vocabulary."""

    def add(self, module: AdaptedModule, y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Adds the adapters' share at a module.

        Args:
            module: one of `paths`.
            y: (..., out), what the module returned; may be overwritten.
            x: (..., in), what it was given, or (...) ids; both row-major over the batch's rows.

        Returns:
            (..., out), in y's dtype; an output layer's with the logits of added tokens behind.
        """


class AdaptedModule:
    """One place of the base, with its hook.

    Attributes:
        path: the module's path.
        kind: what the module computes.
        embedding: whether the module is given ids.
        vocabulary: of an embedding or an output layer, how many tokens the base has.
        module: the module itself.
        at: what is hooked: the module, or the product within it whose parts several processes add up.
        base: its forward without this model's adapters.
        batch: the batch now in the model, if one of its adapters touches this module.
        aligned: its factors begin where kernels can load them, as layouts see to.
    """

    aligned = True

    def __init__(self, path: str, module: nn.Module, at: nn.Module | None = None) -> None:
        place = place_of(module)
        assert place is not None, f"{path} was exported, so it can carry an adapter"
        self._take(path, module, place.kind, at)
        self.vocabulary = place.in_features if self.embedding else place.out_features
        self.at.register_forward_hook(self._add, with_kwargs=True)
        if self.embedding:
            module.register_forward_pre_hook(self._clamp, with_kwargs=True)

    def _take(self, path: str, module: nn.Module, kind: Kind, at: nn.Module | None = None) -> None:
        self.path = path
        self.at = module if at is None else at
        self.batch: Batch | None = None
        self.kind = kind
        self.embedding = kind == "embedding"
        self.base: Callable[..., torch.Tensor] = self.at.forward
        self.module = module
        self._ids: torch.Tensor | None = None

    def serve_with(self, forward: Callable[..., torch.Tensor]) -> None:
        """Puts another forward in the place of what is hooked, which stays callable as `base`."""
        self.base = self.at.forward  # maybe another model's on the same base, which must stay in the chain
        self.at.forward = forward

    @property
    def device(self) -> torch.device:
        """Where the module computes."""
        return device_of(self.module)

    @property
    def output_scale(self) -> float:
        """What the module multiplies its product by: Gemma's embeddings do, and PEFT scales the adapter alike."""
        scale = getattr(self.module, "embed_scale", None)
        if not isinstance(self.module, nn.Embedding) or scale is None:
            return 1.0
        return float(torch.as_tensor(scale).to(self.module.weight.dtype))

    def _add(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], y: torch.Tensor) -> torch.Tensor:
        """Adds the adapters' share to y (..., out) for x (..., in), both row-major over the batch's rows."""
        batch = self.batch
        if batch is None:
            return y
        x = args[0] if args else next(iter(kwargs.values()))
        self.check_rows(x, batch.rows)
        y = batch.add(self, y, x)
        ids, self._ids = self._ids, None
        return y if ids is None else batch.added.embed(self, y, ids)

    def _clamp(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Gives an embedding ids that it has, and keeps those that adapters added."""
        self._ids = None
        if self.batch is None or self.path not in self.batch.added:
            return None
        self._ids = args[0] if args else next(iter(kwargs.values()))
        assert self._ids is not None
        clamped = self._ids.clamp(max=self.vocabulary - 1)
        return ((clamped, *args[1:]), kwargs) if args else (args, {**kwargs, next(iter(kwargs)): clamped})

    def check_rows(self, x: torch.Tensor, rows: Rows) -> None:
        """Refuses an input that cannot hold the same number of tokens for each of the batch's rows.

        Raises:
            AdapterIdsError: naming the module.
        """
        ids = 1 if self.embedding else 2
        tokens = x.numel() // (1 if self.embedding else x.shape[-1])
        lead = x.shape[0] if x.dim() > ids else tokens
        if rows.exact and tokens != len(rows.slots) * rows.tokens:
            raise AdapterIdsError(
                f"{self.path} was given {tokens} tokens where the batch has {len(rows.slots) * rows.tokens}: the model "
                "does not feed it the tokens of the rows, so an adapter that acts on some of them only (aLoRA) cannot "
                "share a batch with one on it; train without it."
            )
        if not rows.exact and lead % (len(rows.slots) * rows.tokens):
            raise AdapterIdsError(
                f"{self.path} was given {lead} rows for {len(rows.slots) * rows.tokens} of the batch: the model does "
                "not feed it row by row, so adapters on it cannot share a batch; give all rows one adapter."
            )


def is_plain_linear(module: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether a module is torch's own Linear with a weight that is what it says: not quantised, not parametrised.

    Whether its forward was wrapped is not looked at.
    """
    return type(module) is nn.Linear and type(module.weight) is nn.Parameter


def device_of(module: nn.Module) -> torch.device:
    """Where a module computes (not where accelerate keeps an offloaded weight)."""
    hook = getattr(module, "_hf_hook", None)
    execution = getattr(hook, "execution_device", None)
    if execution is not None:
        return torch.device(execution)
    return next(itertools.chain(module.parameters(), module.buffers())).device
