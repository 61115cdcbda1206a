"""What adapters of one recipe have in common: one layout, one configuration and one list of extras for all of them.

Knows forms and entries; opens no file.
"""

from __future__ import annotations

import json
from collections.abc import Hashable, Mapping
from typing import Any

import torch

from lorakit.adapters.entry import AdapterEntry, place_extras
from lorakit.adapters.fields import content_key, is_utf8
from lorakit.adapters.form import AdapterForm
from lorakit.adapters.index import Index
from lorakit.adapters.layout import Layout, weight_dtype


class Sharing:
    """Makes entries that share their layouts, configurations and extras with each other and with those there are."""

    def __init__(self, index: Index) -> None:
        self._layouts: dict[Layout, Layout] = {}
        self._by_shapes: dict[Hashable, tuple[Layout, torch.dtype]] = {}
        self._configs: dict[str, Mapping[str, Any]] = {}
        self._extras: dict[Any, Any] = {}
        for layout, config, extras in {
            (id(entry.layout), id(entry.config), id(entry.extras)): (entry.layout, entry.config, entry.extras)
            for entry in index.adapters.values()
        }.values():
            self._layouts.setdefault(layout, layout)
            self._configs.setdefault(content_key(config), config)
            self._extras.setdefault(extras, extras)

    def entry(self, name: str, form: AdapterForm, source: str) -> AdapterEntry:
        """The entry of a form, not placed yet."""
        layout, dtype = self._layout(form)
        config = json.loads(json.dumps(dict(form.config)))
        extras = place_extras(form.extras, layout.nbytes(dtype))
        return AdapterEntry(
            name=name,
            method=form.method,
            layout=layout,
            config=self._configs.setdefault(content_key(config), config),
            dtype=dtype,
            extras=self._extras.setdefault(extras, extras),
            source=source if is_utf8(source) else source.encode("utf-8", "replace").decode(),
            uses_base_weights=form.uses_base_weights,
            base_quantisation=form.base_quantisation,
            svd_errors={path: float(f"{error:.3e}") for path, error in form.svd_errors.items()},
            task_id=form.task_id,
        )

    def _layout(self, form: AdapterForm) -> tuple[Layout, torch.dtype]:
        """`Layout.of` and `weight_dtype`, found once for all forms of the same shapes and dtypes."""
        shapes: list[Hashable] = []
        for path, module in form.modules.items():
            shapes += path, module.kind, module.in_features, module.out_features, module.scale
            for item, tensor in module.tensors():
                shapes += item, tensor.shape, tensor.dtype
        key = tuple(shapes)
        if key not in self._by_shapes:
            layout = Layout.of(form)
            self._by_shapes[key] = self._layouts.setdefault(layout, layout), weight_dtype(form)
        return self._by_shapes[key]
