"""How the tensors of an adapter lie in one extent: the same on disk, in host memory and in a device's slot.

An extent is the *weights* region (every A, B and w, in the adapter's weight dtype) followed by the *vectors* region
(every c and d, fp32). Offsets count elements of their region, not bytes, so one layout serves every weight dtype: a
whole region is cast in one go and each tensor stays where it was. B lies transposed, as (r, out): like A's, its rows
are long and start aligned whatever the rank, so kernels read both with full-width loads.

Knows forms and flat tensors; knows no file, no device.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, reduce
from math import prod
from typing import Any, NamedTuple, TypeVar, cast, get_args

import numpy
import torch

from lorakit.adapters.dtypes import SAFETENSORS_CODES, WEIGHT_DTYPES
from lorakit.adapters.fields import Fields, content_key
from lorakit.adapters.form import ITEMS, WEIGHTS, AdapterForm, Kind, ModuleForm
from lorakit.errors import BankError

ALIGNMENT = 8
"""Every tensor starts at a multiple of this many elements: 16 bytes at two bytes an element, what a thread loads."""

_FEATURES_LIMIT = 1 << 40
_T = TypeVar("_T", torch.Tensor, numpy.ndarray)


def _aligned(elements: int) -> int:
    return -(-elements // ALIGNMENT) * ALIGNMENT


def natural_key(path: str) -> tuple[list[tuple[int, str]], str]:
    """Sorts "layers.2" before "layers.10"."""
    parts = re.split(r"([0-9]+)", path)
    # Numbers are compared as text of known length: int() would refuse a path with thousands of digits.
    digits = [part.lstrip("0") if index % 2 else part for index, part in enumerate(parts)]
    return [(len(part) if index % 2 else 0, part) for index, part in enumerate(digits)], path


def weight_dtype(form: AdapterForm) -> torch.dtype:
    """The narrowest dtype that holds every A, B and w of a form without loss (float32 for a form without any)."""
    modules = form.modules.values()
    dtypes = {tensor.dtype for module in modules for item, tensor in module.tensors() if item in WEIGHTS}
    assert dtypes <= set(WEIGHT_DTYPES), f"the reader lets only {WEIGHT_DTYPES} through, not {dtypes}"
    return reduce(torch.promote_types, dtypes) if dtypes else torch.float32


class Span(NamedTuple):
    """Where one tensor lies.

    Attributes:
        path: the module.
        item: one of `form.ITEMS`.
        offset: the first element within its region.
        shape: the tensor's shape; its elements lie in row-major order.
    """

    path: str
    item: str
    offset: int
    shape: tuple[int, ...]

    @property
    def end(self) -> int:
        """The element after the last."""
        return self.offset + prod(self.shape)


class StoredTensor(NamedTuple):
    """One tensor of an adapter as a shard's header has it.

    Attributes:
        name: its name in the shard, or that without the adapter's.
        code: safetensors' code of its dtype.
        shape: its shape.
        begin: its first byte, counted from the adapter's first byte.
        end: the byte after its last.
    """

    name: str
    code: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def is_gap(self) -> bool:
        """Whether it only fills what aligns others; of a name without the adapter's."""
        return "/" not in self.name


def with_gaps(tensors: Iterable[StoredTensor], place: int = 0, gaps: int = 0) -> Iterator[StoredTensor]:
    """Tensors without a hole: a safetensors file may have none, so the gaps that align tensors are tensors too.

    Args:
        tensors: in the order in which they lie; one without a name only marks a region's end.
        place: where the first gap can begin.
        gaps: how many there are before.
    """
    for tensor in tensors:
        if tensor.begin > place:
            yield StoredTensor(f"~pad{gaps}", "U8", (tensor.begin - place,), place, tensor.begin)
            gaps += 1
        if tensor.name:
            yield tensor
        place = tensor.end


@dataclass(frozen=True)
class ModuleLayout:
    """One module's shapes and places.

    Attributes:
        path: the module's path in the base model.
        kind: "linear", "embedding", "norm", "experts" or "router".
        in_features: the input width, or an embedding's number of rows.
        out_features: the output width.
        rank: r; 0 without factors.
        scale: s.
        a: A's first element in the weights region, or None; A is (r, in), for an embedding (in, r), for experts
            (E, r, in).
        b: B's, or None; B lies transposed, (r, out), for experts (E, r, out).
        c: c's first element in the vectors region, or None; c is (out,).
        d: d's, or None; d is (out,).
        w: w's first element in the weights region, or None; w is (out, in), for an embedding (in, out).
        experts: E; 1 for what is no parameter of experts.
        t: t's, or None; t is (added, in), for an embedding (added, out).
        added: the tokens that it adds to the vocabulary; 0 without t.
    """

    path: str
    kind: Kind
    in_features: int
    out_features: int
    rank: int = 0
    scale: float = 1.0
    a: int | None = None
    b: int | None = None
    c: int | None = None
    d: int | None = None
    w: int | None = None
    experts: int = 1
    t: int | None = None
    added: int = 0

    def weights(self) -> Iterator[Span]:
        """A, B, w and t, where there are any."""
        if self.a is not None and self.b is not None:
            each = (self.experts,) if self.kind == "experts" else ()
            shape = (self.in_features, self.rank) if self.kind == "embedding" else (self.rank, self.in_features)
            yield Span(self.path, "a", self.a, (*each, *shape))
            yield Span(self.path, "b", self.b, (*each, self.rank, self.out_features))
        if self.w is not None:
            linear = self.out_features, self.in_features
            yield Span(self.path, "w", self.w, linear[::-1] if self.kind == "embedding" else linear)
        if self.t is not None:
            width = self.out_features if self.kind == "embedding" else self.in_features
            yield Span(self.path, "t", self.t, (self.added, width))

    def vectors(self) -> Iterator[Span]:
        """C and d, where there are any."""
        if self.c is not None:
            yield Span(self.path, "c", self.c, (self.out_features,))
        if self.d is not None:
            yield Span(self.path, "d", self.d, (self.out_features,))

    def to_json(self) -> dict[str, Any]:
        """The module as in bank.json; what is None is left out."""
        sizes = {"path": self.path, "kind": self.kind, "in": self.in_features, "out": self.out_features}
        places = {item: getattr(self, item) for item in ITEMS if getattr(self, item) is not None}
        experts = {"experts": self.experts} if self.kind == "experts" else {}
        added = {"added": self.added} if self.added else {}
        return {**sizes, **experts, "rank": self.rank, "scale": self.scale, **places, **added}

    @classmethod
    def from_json(cls, value: object, where: str) -> ModuleLayout:
        """Reads `to_json`'s value.

        Raises:
            BankError: a field is missing, of a wrong type or out of range.
        """
        fields = Fields(value, where)
        kind = fields.text("kind")
        if kind not in get_args(Kind):
            raise fields.wrong("kind", f"one of {', '.join(get_args(Kind))}")
        places = {item: fields.count(item) for item in ITEMS if item in fields.value}
        if any(place % ALIGNMENT for place in places.values()):
            raise BankError(f"{where} has an offset that is no multiple of {ALIGNMENT}")
        rank = fields.count("rank", limit=_FEATURES_LIMIT)
        if ("a" in places) != ("b" in places) or (rank and "a" not in places):
            raise BankError(f"{where} should have both a and b, or neither and rank 0")
        scale = fields.number("scale")
        if "w" in places and (places.keys() & {"a", "c"} or scale != 1):
            raise BankError(f"{where} has a w, which takes the place of a, b and c, and a scale of 1")
        if ("t" in places) != ("added" in fields.value):
            raise BankError(f"{where} should have both t and added, or neither")
        if kind == "norm" and places.keys() & {"a", "w", "t"}:
            raise BankError(f"{where} is a norm, which has only c and d")
        if kind == "experts" and places.keys() != {"a", "b"}:
            raise BankError(f"{where} is of experts, and should have a and b alone")
        return cls(
            path=fields.text("path", least=1),
            kind=cast(Kind, kind),
            in_features=fields.count("in", least=1, limit=_FEATURES_LIMIT),
            out_features=fields.count("out", least=1, limit=_FEATURES_LIMIT),
            rank=rank,
            scale=scale,
            a=places.get("a"),
            b=places.get("b"),
            c=places.get("c"),
            d=places.get("d"),
            w=places.get("w"),
            experts=fields.count("experts", least=1, limit=_FEATURES_LIMIT) if kind == "experts" else 1,
            t=places.get("t"),
            added=fields.count("added", least=1, limit=_FEATURES_LIMIT) if "t" in places else 0,
        )


@dataclass(frozen=True)
class Layout:
    """The places of all tensors of an adapter. Adapters of one recipe share one layout.

    Attributes:
        modules: in the order in which their tensors lie.
        weights_elements: the weights region's length; a multiple of 8, so that the vectors start aligned too.
        vector_elements: the vectors region's length in fp32 elements.
    """

    modules: tuple[ModuleLayout, ...]
    weights_elements: int
    vector_elements: int

    @classmethod
    def of(cls, form: AdapterForm) -> Layout:
        """The layout that a form is packed by: modules in natural order of paths, each A, B, w, t and each c, d."""
        modules = []
        for path in sorted(form.modules, key=natural_key):
            module = form.modules[path]
            assert path, "a module has a path"
            for item, tensor in module.tensors():
                assert item in WEIGHTS or tensor.dtype == torch.float32, f"{item} of {path} is {tensor.dtype}"
            placeless = ModuleLayout(
                path=path,
                kind=module.kind,
                in_features=module.in_features,
                out_features=module.out_features,
                rank=module.rank,
                scale=float(module.scale),
                experts=module.experts,
                added=module.added,
            )
            modules.append((placeless, {item: tensor.numel() for item, tensor in module.tensors()}))
        return cls.placing(modules)

    @classmethod
    def placing(cls, modules: Iterable[tuple[ModuleLayout, Mapping[str, int]]]) -> Layout:
        """Lays tensors one after another.

        Args:
            modules: each with its tensors in their order, item → elements to set aside for it; places that a module has
                already do not count.
        """
        placed = []
        weights = vectors = 0
        for module, elements in modules:
            places: dict[str, Any] = {}
            for item, count in elements.items():
                if item in WEIGHTS:
                    places[item], weights = weights, _aligned(weights + count)
                else:
                    places[item], vectors = vectors, _aligned(vectors + count)
            placed.append(dataclasses.replace(module, **places))
        return cls(tuple(placed), weights, vectors)

    @cached_property
    def weight_spans(self) -> tuple[Span, ...]:
        """Every A, B and w by place."""
        return tuple(sorted((span for module in self.modules for span in module.weights()), key=_place))

    @cached_property
    def vector_spans(self) -> tuple[Span, ...]:
        """Every c and d by place."""
        return tuple(sorted((span for module in self.modules for span in module.vectors()), key=_place))

    @cached_property
    def parameters(self) -> int:
        """The number of elements of all tensors, without the gaps that align them."""
        return sum(span.end - span.offset for span in self.weight_spans + self.vector_spans)

    @cached_property
    def ranks(self) -> tuple[int, ...]:
        """The different ranks there are, ascending; without 0 where any module has factors."""
        return tuple(sorted({module.rank for module in self.modules if module.rank})) or (0,)

    @cached_property
    def key(self) -> str:
        """The content's short name: equal layouts, equal keys."""
        return content_key(self.to_json())

    def nbytes(self, dtype: torch.dtype) -> int:
        """An extent's bytes with weights of this dtype."""
        return self.weights_elements * dtype.itemsize + self.vector_elements * 4

    def places(self, dtype: torch.dtype) -> Sequence[StoredTensor]:
        """The tensors of an extent as they lie in a shard, without a hole; listed once for all adapters.

        Args:
            dtype: the weights'.
        """
        if dtype not in self._places:
            self._places[dtype] = tuple(with_gaps(self._stored(dtype)))
        return self._places[dtype]

    @cached_property
    def _places(self) -> dict[torch.dtype, tuple[StoredTensor, ...]]:
        return {}

    def _stored(self, weights: torch.dtype) -> Iterator[StoredTensor]:
        cut = self.weights_elements * weights.itemsize
        for spans, dtype, start, end in (
            (self.weight_spans, weights, 0, cut),
            (self.vector_spans, torch.float32, cut, self.nbytes(weights)),
        ):
            for path, item, offset, shape in spans:
                begin = start + offset * dtype.itemsize
                nbytes = prod(shape) * dtype.itemsize
                yield StoredTensor(f"{path}/{item}", SAFETENSORS_CODES[dtype], shape, begin, begin + nbytes)
            yield StoredTensor("", "", (), end, end)

    def views(self, weights: torch.Tensor, vectors: torch.Tensor) -> dict[str, ModuleForm]:
        """The modules of an extent, without a copy.

        Args:
            weights: (weights_elements,), of any weight dtype, on any device.
            vectors: (vector_elements,) fp32.

        Returns:
            Module path → its form; the tensors are views, B's a transposed one.
        """
        assert weights.shape == (self.weights_elements,) and vectors.shape == (self.vector_elements,)
        forms = {}
        for module in self.modules:
            tensors = {
                span.item: stored(span.item, weights[span.offset : span.end].view(span.shape))
                for span in module.weights()
            }
            tensors |= {span.item: vectors[span.offset : span.end] for span in module.vectors()}
            forms[module.path] = ModuleForm(
                kind=module.kind,
                in_features=module.in_features,
                out_features=module.out_features,
                a=tensors.get("a"),
                b=tensors.get("b"),
                scale=module.scale,
                c=tensors.get("c"),
                d=tensors.get("d"),
                w=tensors.get("w"),
                t=tensors.get("t"),
            )
        return forms

    def pack(self, form: AdapterForm, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Copies a form of this layout into a fresh extent.

        Args:
            form: a form with `Layout.of(form) == self`.
            dtype: the weights' dtype; A, B and w are cast to it.

        Returns:
            The weights (weights_elements,) of `dtype` and the vectors (vector_elements,) fp32; gaps are zero.
        """
        weights = torch.zeros(self.weights_elements, dtype=dtype)
        vectors = torch.zeros(self.vector_elements, dtype=torch.float32)
        views = self.views(weights, vectors)
        assert views.keys() == form.modules.keys()
        for path, view in views.items():
            source = dict(form.modules[path].tensors())
            for item, tensor in view.tensors():
                assert tensor.shape == source[item].shape
                tensor.copy_(source[item])
        return weights, vectors

    def to_json(self) -> dict[str, Any]:
        """The layout as in bank.json."""
        modules = [module.to_json() for module in self.modules]
        return {"weights": self.weights_elements, "vectors": self.vector_elements, "modules": modules}

    @classmethod
    def from_json(cls, value: object, where: str = "layout") -> Layout:
        """Reads `to_json`'s value.

        Args:
            value: parsed JSON, not trusted.
            where: its place, for messages.

        Raises:
            BankError: a wrong field, a tensor outside its region, tensors that overlap, a module that comes twice.
        """
        fields = Fields(value, where)
        modules = [
            ModuleLayout.from_json(module, f"{where}.modules[{index}]")
            for index, module in enumerate(fields.items("modules"))
        ]
        if len({module.path for module in modules}) < len(modules):
            raise BankError(f"{where} names a module twice")
        layout = cls(tuple(modules), fields.count("weights"), fields.count("vectors"))
        if layout.weights_elements % ALIGNMENT or layout.vector_elements % ALIGNMENT:
            raise BankError(f"{where} has a region whose length is no multiple of {ALIGNMENT}")
        for spans, end in (
            (layout.weight_spans, layout.weights_elements),
            (layout.vector_spans, layout.vector_elements),
        ):
            place = 0
            for span in spans:
                if span.offset < place or span.end > end:
                    raise BankError(f"{where}: {span.item} of {span.path} overlaps another tensor or lies outside")
                place = span.end
        return layout


def stored(item: str, tensor: _T) -> _T:
    """A form's tensor or array as it lies in an extent, or back: B is transposed, of experts each one's. A view."""
    return tensor.swapaxes(-1, -2) if item == "b" else tensor


def _place(span: Span) -> tuple[int, int]:
    return span.offset, span.end


@dataclass(frozen=True, eq=False)
class Extent:
    """One adapter's bytes in memory.

    Attributes:
        layout: where its tensors lie.
        weights: (layout.weights_elements,), float32, bfloat16 or float16.
        vectors: (layout.vector_elements,) fp32.
    """

    layout: Layout
    weights: torch.Tensor
    vectors: torch.Tensor

    @classmethod
    def of_bytes(cls, layout: Layout, dtype: torch.dtype, buffer: torch.Tensor) -> Extent:
        """Sees bytes as an extent, without a copy.

        Args:
            layout: where its tensors lie.
            dtype: the weights' dtype.
            buffer: (at least layout.nbytes(dtype),) uint8, contiguous, starting at a multiple of 4 bytes.
        """
        cut = layout.weights_elements * dtype.itemsize
        end = layout.nbytes(dtype)
        return cls(layout, buffer[:cut].view(dtype), buffer[cut:end].view(torch.float32))

    @classmethod
    def of_form(cls, form: AdapterForm) -> Extent:
        """Copies a form into a fresh extent, without loss."""
        layout = Layout.of(form)
        return cls(layout, *layout.pack(form, weight_dtype(form)))

    @property
    def dtype(self) -> torch.dtype:
        """The weights' dtype."""
        return self.weights.dtype

    @property
    def nbytes(self) -> int:
        """The extent's bytes."""
        return self.layout.nbytes(self.dtype)

    def modules(self) -> dict[str, ModuleForm]:
        """Module path → its form, as views."""
        return self.layout.views(self.weights, self.vectors)
