"""A bank's index: the contents of bank.json.

Everything needed to find an adapter's bytes is in it, so opening a bank reads no shard. What adapters of one recipe
have in common (layout, configuration, list of extras) is stored once, under a hash of its content.

Knows JSON and entries; opens no file. Nothing in an index is trusted: parsing gives an `Index` whose every field
holds, or a `BankError`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Any, TypeVar

from lorakit.adapters.dtypes import DTYPES, WEIGHT_DTYPES, dtype_name
from lorakit.adapters.entry import AdapterEntry, ExtraTensor
from lorakit.adapters.fields import LIMIT, Fields, compact_json, content_key
from lorakit.adapters.layout import Layout
from lorakit.adapters.names import is_name, not_found
from lorakit.adapters.shard import ShardFacts, shard_number
from lorakit.errors import AdapterNameError, BankError, ConfigError

FORMAT_VERSION = 3
"""3: adapters are hashed by BLAKE3, and may bring whole weights; 2: B lies transposed. There are no older banks outside
of development."""

_BLAKE3 = re.compile(r"[0-9a-f]{64}")
_T = TypeVar("_T")


@dataclass(frozen=True)
class Index:
    """What a bank holds.

    Attributes:
        base_id: the base model's id or path.
        fingerprint: facts that tell the base model from others; opaque here.
        next_shard: the number of the next new shard. Numbers are never used twice, so a reader with an older index
            misses a deleted shard instead of reading another's bytes.
        shards: file name → facts.
        adapters: name → entry, in the order added.
    """

    base_id: str
    fingerprint: dict[str, Any]
    next_shard: int = 1
    shards: Mapping[str, ShardFacts] = field(default_factory=dict)
    adapters: Mapping[str, AdapterEntry] = field(default_factory=dict)

    def live_nbytes(self) -> dict[str, int]:
        """Shard → the bytes of the adapters that it holds."""
        live = dict.fromkeys(self.shards, 0)
        for entry in self.adapters.values():
            live[entry.shard] += entry.stored_nbytes
        return live

    def changed(
        self,
        adapters: Mapping[str, AdapterEntry],
        shards: Mapping[str, ShardFacts] | None = None,
    ) -> Index:
        """The index after a change.

        Args:
            adapters: all adapters there are then.
            shards: the new shards, numbered from `next_shard` on.

        Returns:
            A new index; shards without an adapter are left out.
        """
        known = {**self.shards, **(shards or {})}
        used = {entry.shard for entry in adapters.values()}
        return Index(
            base_id=self.base_id,
            fingerprint=self.fingerprint,
            next_shard=self.next_shard + len(shards or {}),
            shards={name: facts for name, facts in known.items() if name in used},
            adapters=dict(adapters),
        )

    def only(self, adapters: Iterable[str], where: str) -> Index:
        """The index of some of its adapters, in the order added.

        Args:
            adapters: their names.
            where: the bank, for messages, as "bank 'tenants'".

        Raises:
            AdapterNotFoundError: no such adapter.
            AdapterNameError: a name comes twice.
            ConfigError: it is no list of names.
        """
        if isinstance(adapters, str) or not isinstance(adapters, Iterable):
            raise ConfigError(f"adapters is {adapters!r}; give a list of names, or None for all.")
        names = set()
        for name in adapters:
            if not isinstance(name, str) or name not in self.adapters:
                raise not_found(name, self.adapters, where)
            if name in names:
                raise AdapterNameError(f"adapter {name!r} comes twice: name each adapter once.")
            names.add(name)
        return self.changed({name: entry for name, entry in self.adapters.items() if name in names})

    def dump(self) -> bytes:
        """The contents of bank.json: one line a module of a layout, one line an adapter."""
        layouts: dict[str, Any] = {}
        configs: dict[str, Any] = {}
        extras: dict[str, Any] = {}
        adapters: dict[str, Any] = {}
        seen: dict[int, str] = {}

        def key_of(shared: Any, table: dict[str, Any], to_json: Callable[[Any], Any]) -> str:
            # Shared objects are hashed once, not once an adapter; the entries keep them alive, so ids stay unique.
            key = seen.get(id(shared))
            if key is None:
                value = to_json(shared)
                key = seen[id(shared)] = content_key(value)
                table[key] = value
            return key

        for name, entry in self.adapters.items():
            adapters[name] = {
                "method": entry.method,
                "dtype": dtype_name(entry.dtype),
                "layout": key_of(entry.layout, layouts, Layout.to_json),
                "config": key_of(entry.config, configs, dict),
                **({"extras": key_of(entry.extras, extras, _extras_to_json)} if entry.extras else {}),
                "shard": entry.shard,
                "offset": entry.offset,
                "nbytes": entry.stored_nbytes,
                "blake3": entry.blake3,
                "source": entry.source,
                "uses_base_weights": entry.uses_base_weights,
                **({"base_quantisation": entry.base_quantisation} if entry.base_quantisation else {}),
                **({"svd_errors": [entry.svd_errors.get(path) for path in entry.modules]} if entry.svd_errors else {}),
                **({} if entry.task_id is None else {"task_id": entry.task_id}),
            }
        facts = {
            name: {"nbytes": shard.nbytes, "payload_nbytes": shard.payload_nbytes}
            for name, shard in sorted(self.shards.items())
        }
        parts = {
            "format_version": str(FORMAT_VERSION),
            "lorakit_version": json.dumps(_lorakit_version()),
            "base": _indented({"id": self.base_id, "fingerprint": self.fingerprint}),
            "next_shard": str(self.next_shard),
            "shards": _table(facts),
            "layouts": _table(dict(sorted(layouts.items())), _layout_text),
            "configs": _table(dict(sorted(configs.items()))),
            "extras": _table(dict(sorted(extras.items()))),
            "adapters": _table(adapters),
        }
        body = ",\n".join(f"  {json.dumps(key)}: {text}" for key, text in parts.items())
        return f"{{\n{body}\n}}\n".encode("ascii")

    @classmethod
    def parse(cls, data: bytes) -> Index:
        """Reads bank.json.

        Raises:
            BankError: it is no index, or one whose fields contradict each other.
        """
        try:
            return cls._parse(data)
        except RecursionError as error:
            raise BankError("it is nested too deeply") from error

    @classmethod
    def _parse(cls, data: bytes) -> Index:
        try:
            value = json.loads(data)
        except ValueError as error:
            raise BankError(f"it is no JSON: {error}") from error
        root = Fields(value, "index")
        found = root.count("format_version", least=1)
        if found > FORMAT_VERSION:
            wrote = root.value.get("lorakit_version")
            writer = f" {wrote}" if isinstance(wrote, str) and len(wrote) < 40 else ""
            raise BankError(
                f"it has format {found}, written by a newer lorakit{writer}; this one reads format {FORMAT_VERSION}. "
                "Upgrade lorakit"
            )
        if found < FORMAT_VERSION:
            raise BankError(f"it has format {found}; this lorakit reads {FORMAT_VERSION}. Export its adapters again")
        base = root.object("base")
        shards = {name: _shard(facts) for name, facts in _objects(root.object("shards"))}
        next_shard = root.count("next_shard", least=1)
        for name in shards:
            number = shard_number(name)
            if number is None or number >= next_shard:
                raise BankError(f"{name!r} is no name of a shard")
        tables = _Tables(
            layouts=_by_key(root, "layouts", Layout.from_json),
            configs=_by_key(root, "configs", lambda value, where: Fields(value, where).value),
            extras=_by_key(root, "extras", _extras_from_json) if "extras" in root.value else {},
        )
        adapters = {name: _entry(name, fields, tables, shards) for name, fields in _objects(root.object("adapters"))}
        _check_ranges(adapters.values(), shards)
        return cls(base.text("id"), base.object("fingerprint").value, next_shard, shards, adapters)


@dataclass(frozen=True)
class _Tables:
    layouts: dict[str, Layout]
    configs: dict[str, dict[str, Any]]
    extras: dict[str, tuple[ExtraTensor, ...]]


def _objects(fields: Fields) -> Iterable[tuple[str, Fields]]:
    return ((key, Fields(value, f"{fields.where}.{key}")) for key, value in fields.value.items())


def _by_key(root: Fields, name: str, read: Callable[[object, str], _T]) -> dict[str, _T]:
    table = {}
    for key, value in root.object(name).value.items():
        # The key is the content's hash, so damage to what many adapters share is found at once.
        if content_key(value) != key:
            raise BankError(f"{name}.{key[:40]} does not match its key: it was changed or damaged")
        table[key] = read(value, f"{name}.{key}")
    return table


def _shard(fields: Fields) -> ShardFacts:
    return ShardFacts(fields.count("nbytes"), fields.count("payload_nbytes"))


def _entry(name: str, fields: Fields, tables: _Tables, shards: Mapping[str, ShardFacts]) -> AdapterEntry:
    if not is_name(name):
        raise BankError(f"{fields.where[:80]!r} is no adapter's name")

    def shared(key: str, table: Mapping[str, _T]) -> _T:
        value = fields.value.get(key)
        if not isinstance(value, str) or value not in table:
            raise fields.wrong(key, f"a key of the index's {key} table")
        return table[value]

    dtype = DTYPES.get(fields.text("dtype"))
    if dtype is None or dtype not in WEIGHT_DTYPES:
        raise fields.wrong("dtype", "float32, bfloat16 or float16")
    shared("shard", shards)
    blake3 = fields.text("blake3")
    if not _BLAKE3.fullmatch(blake3):
        raise fields.wrong("blake3", "64 hexadecimal digits")
    layout = shared("layout", tables.layouts)
    entry = AdapterEntry(
        name=name,
        method=fields.text("method", least=1),
        layout=layout,
        config=shared("config", tables.configs),
        dtype=dtype,
        extras=shared("extras", tables.extras) if "extras" in fields.value else (),
        source=fields.text("source"),
        uses_base_weights=fields.flag("uses_base_weights"),
        base_quantisation=fields.text("base_quantisation") if "base_quantisation" in fields.value else "",
        svd_errors=_svd_errors(fields, layout) if "svd_errors" in fields.value else {},
        task_id=fields.count("task_id", limit=1 << 31) if "task_id" in fields.value else None,
        shard=fields.text("shard"),
        offset=fields.count("offset", least=8),
        blake3=blake3,
    )
    if entry.extras and entry.extras[0].offset < entry.nbytes:
        raise BankError(f"{fields.where}: its extras overlap its extent")
    if fields.count("nbytes") != entry.stored_nbytes:
        raise fields.wrong("nbytes", f"{entry.stored_nbytes}, as its layout says")
    return entry


def _svd_errors(fields: Fields, layout: Layout) -> dict[str, float]:
    errors = fields.items("svd_errors")
    right = all(error is None or (type(error) in (int, float) and 0 <= error < LIMIT) for error in errors)
    if not right or len(errors) != len(layout.modules):
        raise fields.wrong("svd_errors", "a number or null a module")
    return {
        module.path: float(error) for module, error in zip(layout.modules, errors, strict=True) if error is not None
    }


def _check_ranges(entries: Iterable[AdapterEntry], shards: Mapping[str, ShardFacts]) -> None:
    place, shard = 0, ""
    for entry in sorted(entries, key=lambda entry: (entry.shard, entry.offset, entry.stored_nbytes)):
        if entry.shard != shard:
            place, shard = 0, entry.shard
        if entry.offset < place:
            raise BankError(f"adapters.{entry.name} overlaps another adapter in {shard}")
        place = entry.offset + entry.stored_nbytes
        if place > shards[shard].nbytes:
            raise BankError(f"adapters.{entry.name} lies outside of {shard}")


def _extras_to_json(extras: tuple[ExtraTensor, ...]) -> list[dict[str, Any]]:
    return [
        {"name": extra.name, "dtype": dtype_name(extra.dtype), "shape": list(extra.shape), "offset": extra.offset}
        for extra in extras
    ]


def _extras_from_json(value: object, where: str) -> tuple[ExtraTensor, ...]:
    extras: list[ExtraTensor] = []
    for index, item in enumerate(Fields({"list": value}, where).items("list")):
        fields = Fields(item, f"{where}[{index}]")
        dtype = DTYPES.get(fields.text("dtype"))
        if dtype is None:
            raise fields.wrong("dtype", "a dtype")
        shape = fields.items("shape")
        if len(shape) > 16 or any(type(size) is not int or not 0 <= size < LIMIT for size in shape):
            raise fields.wrong("shape", "a list of sizes")
        extra = ExtraTensor(fields.text("name", least=1), dtype, tuple(shape), fields.count("offset"))
        if extra.end >= LIMIT or extra.offset % dtype.itemsize or (extras and extra.offset < extras[-1].end):
            raise fields.wrong("offset", "aligned, and behind the tensor before")
        extras.append(extra)
    if len({extra.name for extra in extras}) < len(extras):
        raise BankError(f"{where} names a tensor twice")
    return tuple(extras)


def _lorakit_version() -> str:
    try:
        return version("lorakit")
    except PackageNotFoundError:
        return "unknown"


def _indented(value: object) -> str:
    return json.dumps(value, indent=2, sort_keys=True).replace("\n", "\n  ")


def _table(rows: Mapping[str, Any], text: Callable[[Any], str] = compact_json) -> str:
    if not rows:
        return "{}"
    lines = ",\n".join(f"    {json.dumps(key)}: {text(row)}" for key, row in rows.items())
    return f"{{\n{lines}\n  }}"


def _layout_text(layout: dict[str, Any]) -> str:
    head = compact_json({key: value for key, value in layout.items() if key != "modules"})[:-1]
    if not layout["modules"]:
        return f'{head}, "modules": []}}'
    modules = ",\n".join(f"      {compact_json(module)}" for module in layout["modules"])
    return f'{head}, "modules": [\n{modules}\n    ]}}'
