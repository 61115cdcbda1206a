"""Tokens that adapters add to the base's vocabulary: their rows of a batch, at its embedding and its output layer.

An id of the base is looked up by the base; one after the base's last is looked up in the row's own adapter. The output
layer gives each row as many more logits as the batch's largest number of added tokens: its own adapter's, and −inf
after those, so that softmax and argmax of other rows are as without them and no row is given another tenant's token.

Plain torch for every device, with static shapes and no wait for the device. For n rows of t tokens, K added tokens and
width D, in elements:

    at the embedding       n·t·D looked up and selected once more
    at the output layer    n·K·D read for t of n rows, 2·n·t·K·D operations; y is copied once, n·t·(V + K)

The check of ids reads the inputs once a call, which waits for the device. Knows rows, slots and modules; no name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import reduce
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from lorakit.errors import AdapterIdsError
from lorakit.runtime.layers import AdaptedModule

if TYPE_CHECKING:
    from lorakit.adapters.layout import Layout, ModuleLayout
    from lorakit.runtime.experts import AdaptedParameter
    from lorakit.runtime.layers import Batch
    from lorakit.runtime.pool import Slot
    from lorakit.runtime.rows import Rows

_IDS = ("input_ids", "inputs", "decoder_input_ids")


class _Rows(NamedTuple):
    """The added rows at one module.

    Attributes:
        table: (S, K, D), those of S adapters, zeros after an adapter's last.
        adapter: (n,) int64, each row's place in the table.
        counts: (n,) int64, each row's own number of added tokens.
        most: K.
    """

    table: torch.Tensor
    adapter: torch.Tensor
    counts: torch.Tensor
    most: int


class AddedTokens:
    """The added tokens of a batch."""

    def __init__(self, rows: Rows, modules: Mapping[str, AdaptedModule | AdaptedParameter]) -> None:
        """Copies what was added, which is little: slots may move later.

        Args:
            rows: the rows, and the slot of each.
            modules: path → the module or parameter, for every path that a slot touches.
        """
        self._n = len(rows.slots)
        added = {module.path for slot in rows.used for module in slot.layout.modules if module.added}
        self._modules = {
            path: module
            for path in rows.touched
            if path in added and isinstance(module := modules[path], AdaptedModule)
        }
        self._rows = {path: _stacked(rows.slots, path, module.device) for path, module in self._modules.items()}

    def __contains__(self, path: str) -> bool:
        """Whether some row's adapter adds tokens at a module."""
        return path in self._rows

    @property
    def at_output(self) -> bool:
        """Whether some row's adapter adds tokens at the output layer."""
        return any(not module.embedding for module in self._modules.values())

    def embed(self, module: AdaptedModule, y: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """Puts the rows of added tokens into an embedding's output.

        Args:
            module: the embedding.
            y: (..., D), for ids that were clamped to the base's.
            ids: (...), as they were.
        """
        rows = self._rows[module.path]
        place = ids.reshape(self._n, -1).to(rows.table.device) - module.vocabulary
        inside = (place >= 0) & (place < rows.counts.unsqueeze(1))
        flat = place.clamp(0, rows.most - 1) + rows.adapter.unsqueeze(1) * rows.most
        new = torch.nn.functional.embedding(flat, rows.table.flatten(0, 1)) * module.output_scale
        old = y.reshape(self._n, -1, y.shape[-1])
        return torch.where(inside.unsqueeze(-1), new.to(y.dtype), old).reshape(y.shape)

    def widen(self, module: AdaptedModule, y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Adds the logits of added tokens.

        Args:
            module: the output layer.
            y: (..., V).
            x: (..., D), what the layer was given.

        Returns:
            (..., V + K), in y's dtype.
        """
        rows = self._rows[module.path]
        table = rows.table.index_select(0, rows.adapter)  # (n, K, D)
        dtype = torch.promote_types(x.dtype, table.dtype)
        given = x.reshape(self._n, -1, x.shape[-1]).to(dtype)
        logits = torch.bmm(given, table.to(dtype).transpose(1, 2))
        logits = torch.where(self._there(rows), logits.to(y.dtype), float("-inf"))
        return torch.cat([y, logits.reshape(*y.shape[:-1], rows.most)], dim=-1)

    def mask(self, logits: torch.Tensor) -> None:
        """Makes −inf again, in place, what the model did to it after its output layer (a soft cap).

        Args:
            logits: (rows, ..., V + K).
        """
        for path, rows in self._rows.items():
            module = self._modules[path]
            if not module.embedding and logits.shape[-1] == module.vocabulary + rows.most:
                tokens = logits.shape[:-1].numel()
                there = self._there(rows).to(logits.device).expand(-1, tokens // self._n, -1)
                there = there.reshape(*logits.shape[:-1], rows.most)
                logits[..., module.vocabulary :].masked_fill_(~there, float("-inf"))

    def _there(self, rows: _Rows) -> torch.Tensor:
        """(n, 1, K): which tokens a row's adapter has."""
        return (torch.arange(rows.most, device=rows.counts.device) < rows.counts.unsqueeze(1)).unsqueeze(1)


def check_ids(
    layouts: Sequence[Layout | None],
    starts: Sequence[int | None],
    first: int,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> None:
    """Refuses inputs that rows have no tokens for.

    Args:
        layouts: of each row's adapter, also where it does not act.
        starts: the column from which on it acts; None where it does not.
        first: the column of the first token that the call brings.
        args: of `forward` or `generate`.
        kwargs: the same.

    Raises:
        AdapterIdsError: a row has an id that is neither the base's nor its own adapter's, or one of its adapter's
            before that acts; or there are labels, as the base would take the loss over its own vocabulary.
    """
    added = [_added(layout) for layout in layouts]
    if not any(added):
        return
    acting = any(module is not None and start is not None for module, start in zip(added, starts, strict=True))
    if acting and kwargs.get("labels") is not None:
        raise AdapterIdsError(
            "the base cannot take a loss over tokens that adapters of this batch add; leave labels out, and take it "
            "from the logits."
        )
    vocabulary = next(module.in_features for module in added if module is not None)
    limits = torch.tensor([vocabulary + (0 if module is None else module.added) for module in added])
    for ids in (*args[:1], *(kwargs.get(name) for name in _IDS)):
        if not isinstance(ids, torch.Tensor) or ids.is_floating_point() or ids.numel() % len(layouts):
            continue
        rows = ids.reshape(len(layouts), -1)
        wrong = (rows >= limits.to(ids.device).unsqueeze(1)).any(dim=1)
        if wrong.any():
            row = int(wrong.nonzero()[0])
            raise AdapterIdsError(
                f"row {row} has the token {int(rows[row].max())}, but its adapter and the base have "
                f"{int(limits[row])} tokens, from 0 on; give each row the ids of its own adapter's tokenizer."
            )
        columns = first + torch.arange(rows.shape[1], device=ids.device) % max(1, ids.shape[-1])
        for row, start in enumerate(starts):
            if start == 0:
                continue
            early = rows[row] if start is None else rows[row][columns < start]
            if early.numel() and early.max() >= vocabulary:
                raise AdapterIdsError(
                    f"row {row} has the token {int(early.max())}, which its adapter adds, but the adapter acts from "
                    "its invocation tokens on; put these before it."
                )


def _added(layout: Layout | None) -> ModuleLayout | None:
    """The embedding to which an adapter adds tokens."""
    modules = () if layout is None else layout.modules
    return next((module for module in modules if module.added and module.kind == "embedding"), None)


class LogitsMask:
    """What keeps a model's logits from giving a row another tenant's tokens.

    Attributes:
        batch: the batch now in the model, if one of its adapters adds tokens.
    """

    def __init__(self, model: nn.Module) -> None:
        """Hooks the whole model."""
        self.batch: Batch | None = None
        model.register_forward_hook(self._mask)

    def _mask(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        logits = getattr(output, "logits", None)
        if self.batch is not None and isinstance(logits, torch.Tensor):
            self.batch.added.mask(logits)


def _stacked(slots: Sequence[Slot | None], path: str, device: torch.device) -> _Rows:
    tables: dict[int, torch.Tensor] = {}
    adapter, counts = [], []
    for slot in slots:
        form = None if slot is None else slot.modules.get(path)
        rows = None if form is None else form.t
        if rows is not None:
            tables.setdefault(id(slot), rows)
        adapter.append(list(tables).index(id(slot)) if rows is not None else 0)
        counts.append(0 if rows is None else rows.shape[0])
    most = max(counts)
    dtype = reduce(torch.promote_types, {table.dtype for table in tables.values()})
    padded = [torch.nn.functional.pad(rows.to(dtype), (0, 0, 0, most - len(rows))) for rows in tables.values()]
    return _Rows(
        torch.stack(padded).to(device),
        torch.tensor(adapter, dtype=torch.int64, device=device),
        torch.tensor(counts, dtype=torch.int64, device=device),
        most,
    )
