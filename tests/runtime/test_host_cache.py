"""Adapters in host memory: one flat buffer each, the least recently used forgotten first."""

import pytest
import torch
from extents import bytes_of, extent_of, reader_of

from lorakit.adapters.layout import Extent
from lorakit.errors import BankCorruptedError
from lorakit.runtime.host_cache import ExtentReader, HostCache

ROOM = extent_of().nbytes


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16], ids=str)
def test_a_buffer_holds_what_the_device_will(stored, dtype):
    extent = extent_of(dtype=stored)
    for source in (extent, reader_of(extent)):
        host = HostCache(limit=1 << 20).put("a", source, dtype)
        assert host.dtype == (dtype or stored) and host.layout == extent.layout
        assert torch.equal(host.buffer, bytes_of(extent, dtype))


def test_what_is_stored_in_the_pools_dtype_is_read_straight_into_its_buffer():
    calls = []
    cache = HostCache(limit=1 << 20)
    host = cache.put("a", reader_of(extent_of(dtype=torch.bfloat16), calls), torch.bfloat16)
    assert calls[0].data_ptr() == host.buffer.data_ptr()
    host = cache.put("b", reader_of(extent_of(dtype=torch.float32), calls), torch.bfloat16)
    assert calls[1].data_ptr() != host.buffer.data_ptr()


def test_the_least_recently_used_is_forgotten():
    cache = HostCache(limit=3 * ROOM + 5)
    for seed, key in enumerate("abc"):
        cache.put(key, extent_of(seed))
    assert cache.nbytes == 3 * ROOM
    assert torch.equal(cache.get("a").buffer, bytes_of(extent_of(0)))
    assert "b" in cache and "d" not in cache  # to ask is no use
    cache.put("d", extent_of(3))
    assert cache.keys == ["c", "a", "d"] and cache.get("b") is None
    cache.put("wide", extent_of(width=40))
    assert cache.keys == ["d", "wide"] and cache.nbytes == ROOM + extent_of(width=40).nbytes


def test_a_key_is_kept_once():
    cache = HostCache(limit=3 * ROOM)
    cache.put("a", extent_of(0))
    cache.put("a", extent_of(1))
    assert cache.keys == ["a"] and cache.nbytes == ROOM
    assert torch.equal(cache.get("a").buffer, bytes_of(extent_of(1)))


@pytest.mark.parametrize("limit", [0, ROOM - 1])
def test_an_adapter_without_room_is_served_and_not_kept(limit):
    cache = HostCache(limit=limit)
    small = extent_of(rank=1, layers=1)
    cache.put("small", small)
    kept = cache.keys
    assert torch.equal(cache.put("a", extent_of()).buffer, bytes_of(extent_of()))
    assert cache.keys == kept == (["small"] if limit else []) and cache.nbytes == (small.nbytes if limit else 0)


def test_what_is_being_copied_is_not_forgotten():
    cache = HostCache(limit=2 * ROOM)
    ended = False
    cache.put("a", extent_of(0)).copied = lambda: ended
    cache.put("b", extent_of(1))
    cache.put("c", extent_of(2))
    assert cache.keys == ["a", "c"]
    cache.get("c").copied = lambda: ended
    cache.put("d", extent_of(3))
    assert cache.keys == ["a", "c"]
    ended = True
    cache.put("d", extent_of(3))
    assert cache.keys == ["c", "d"]


def test_dropping_and_keeping_only():
    cache = HostCache(limit=5 * ROOM)
    for seed, key in enumerate("abcd"):
        cache.put(key, extent_of(seed))
    cache.drop("b")
    cache.drop("zebra")
    cache.keep_only({"c", "d", "zebra"})
    assert cache.keys == ["c", "d"] and cache.nbytes == 2 * ROOM
    cache.keep_only(())
    assert cache.nbytes == 0


def test_a_failed_read_changes_nothing():
    cache = HostCache(limit=ROOM)
    cache.put("a", extent_of())

    def read_into(buffer: torch.Tensor) -> Extent:
        raise BankCorruptedError("the file is too short")

    with pytest.raises(BankCorruptedError):
        cache.put("b", ExtentReader(extent_of().layout, torch.float32, read_into))
    assert cache.keys == ["a"] and cache.nbytes == ROOM


@pytest.mark.gpu
def test_pinned_buffers_are_counted_as_they_are_taken():
    cache = HostCache(limit=1 << 20, pinned=True)
    calls = []
    host = cache.put("a", reader_of(extent_of(), calls))
    assert host.buffer.is_pinned() and calls[0].data_ptr() == host.buffer.data_ptr()
    assert torch.equal(host.buffer, bytes_of(extent_of()))
    assert host.buffer.numel() <= cache.nbytes < 2 * host.buffer.numel()
