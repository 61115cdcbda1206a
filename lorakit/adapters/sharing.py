"""What adapters of one recipe have in common: one layout, one configuration and one list of extras for all of them.

Knows forms and entries; opens no file.
"""

from __future__ import annotations

import json
from collections.abc import Hashable, Mapping
from typing import Any

from lorakit.adapters.entry import AdapterEntry, place_extras
from lorakit.adapters.fields import content_key, is_utf8
from lorakit.adapters.form import AdapterForm
from lorakit.adapters.index import Index
from lorakit.adapters.layout import Layout, weight_dtype


class Sharing:
    """Makes entries that share their layouts, configurations and extras with each other and with those there are."""

    def __init__(self, index: Index) -> None:
        self._layouts: dict[Layout, Layout] = {}
        self._by_shapes: dict[Hashable, Layout] = {}
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
        layout = self._layout(form)
        dtype = weight_dtype(form)
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

    def _layout(self, form: AdapterForm) -> Layout:
        """`Layout.of`, made once for all forms of the same shapes and dtypes."""
        shapes = tuple(
            (
                *(path, module.kind, module.in_features, module.out_features, module.scale),
                *((item, tensor.shape, tensor.dtype) for item, tensor in module.tensors()),
            )
            for path, module in form.modules.items()
        )
        layout = self._by_shapes.get(shapes)
        if layout is None:
            layout = Layout.of(form)
            layout = self._by_shapes[shapes] = self._layouts.setdefault(layout, layout)
        return layout
