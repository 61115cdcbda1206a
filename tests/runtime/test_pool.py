"""The pool: contents, places, holds, and on a GPU the order of copies and kernels."""

import itertools
import random
from contextlib import contextmanager, suppress

import pytest
import torch
from extents import bytes_of, extent_of, reader_of

from lorakit.adapters.layout import Extent
from lorakit.errors import BankCorruptedError, PoolFullError
from lorakit.runtime.arena import aligned
from lorakit.runtime.host_cache import ExtentReader
from lorakit.runtime.pool import AdapterPool

CPU = torch.device("cpu")
ROOM = aligned(extent_of().nbytes)


def content(slot):
    return slot.memory.cpu()


def put(pool, key, extent=None, **options):
    """Puts an adapter whose content follows from its key, if none is given."""
    return pool.put(key, extent_of(int(key)) if extent is None else extent, name=f"tenant-{key}", **options)


def check(pool, sources):
    """Every slot holds its source, and the slots' places and numbers are their own."""
    slots = [*pool._slots.values(), *pool._leaving]
    pool.wait(slots)
    for slot in slots:
        assert torch.equal(content(slot), bytes_of(sources[slot.key], pool.dtype)), slot.key
    spans = sorted((slot.address, slot.address + slot.nbytes) for slot in slots)
    assert all(end <= begin for (_, end), (begin, _) in itertools.pairwise(spans)), "slots overlap"
    assert len({slot.index for slot in slots}) == len({slot.generation for slot in slots}) == len(slots)
    assert pool.nbytes == sum(slot.nbytes for slot in slots)
    if pool._arena is not None:
        assert pool.nbytes <= pool.capacity
        assert pool._arena.extents == {
            slot._offset: aligned(slot.nbytes) for slot in sorted(slots, key=lambda slot: slot._offset)
        }
        assert all(slot.address == pool._memory.data_ptr() + slot._offset for slot in slots)


# Contents and accounts


@pytest.mark.parametrize("capacity", [None, 100_000])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
@pytest.mark.parametrize("host_capacity", [None, 1 << 20])
def test_a_slot_holds_the_adapter(capacity, dtype, host_capacity):
    pool = AdapterPool(device=CPU, dtype=dtype, capacity=capacity, host_capacity=host_capacity)
    extent = extent_of(1, rank=5)
    for key, source in {"a": extent, "b": reader_of(extent)}.items():
        slot = put(pool, key, source)
        assert (
            slot.ready() and slot.dtype == (dtype or torch.float32) and slot.nbytes == extent.layout.nbytes(slot.dtype)
        )
        with pool.hold([slot]):
            for path, module in extent.modules().items():
                for item, tensor in module.tensors():
                    expected = tensor.to(slot.dtype) if item in "ab" else tensor
                    assert torch.equal(getattr(slot.modules[path], item), expected)
                assert slot.modules[path].scale == module.scale
                assert slot.modules[path].a.data_ptr() - slot.address < slot.nbytes
    check(pool, {"a": extent, "b": extent})
    assert pool.host.keys == (["a", "b"] if host_capacity else [])


def test_the_arena_is_taken_with_the_first_adapter():
    pool = AdapterPool(device=CPU, capacity=3 * ROOM)
    assert pool._memory is None and pool.nbytes == 0
    slot = put(pool, "0")
    assert pool._memory.numel() == 3 * ROOM and slot.address == pool._memory.data_ptr()


def test_a_resident_adapter_is_not_loaded_again():
    pool = AdapterPool(device=CPU, capacity=2 * ROOM)
    calls = []
    slot = put(pool, "0", reader_of(extent_of(0), calls))
    generation = pool.generation
    assert put(pool, "0", reader_of(extent_of(0), calls)) is slot
    assert len(calls) == 1 and pool.generation == generation


def test_an_adapter_in_host_memory_is_not_read_again():
    pool = AdapterPool(device=CPU, capacity=ROOM, host_capacity=10 * ROOM)
    calls = []
    reader = reader_of(extent_of(0), calls)
    pool.prefetch("0", reader)
    for _ in range(3):
        put(pool, "0", reader)
        put(pool, "1")
    pool.prefetch("1", reader)  # resident
    assert len(calls) == 1 and pool.host.keys == ["0", "1"]
    put(pool, "0", reader)
    pool.drop("0")
    assert pool.host.keys == ["1"]
    pool.keep_only(())
    assert pool.host.keys == [] and pool.keys == []


def test_slots_can_be_loaded_in_and_out_of_inference_mode():
    pool = AdapterPool(device=CPU, capacity=2 * ROOM)
    with torch.inference_mode():
        first = put(pool, "0")
        put(pool, "1")
        first.modules["layers.0.proj"].a.fill_(3)
    put(pool, "2")
    first = pool.get("1")
    first.modules["layers.0.proj"].a.fill_(3)
    assert not first.modules["layers.0.proj"].a.requires_grad


def test_indices_are_the_lowest_free_and_generations_never_come_back():
    pool = AdapterPool(device=CPU, capacity=4 * ROOM)
    slots = [put(pool, str(i)) for i in range(4)]
    assert [slot.index for slot in slots] == [0, 1, 2, 3]
    seen = {slot.generation for slot in slots}
    generation = pool.generation
    pool.drop("2")
    pool.drop("1")
    assert pool.generation > generation and not slots[1].resident
    again = [put(pool, key) for key in ("1", "5", "6")]  # the last evicts 0
    assert "0" not in pool and "5" in pool
    assert (pool.loads, pool.loaded_bytes, pool.evictions) == (7, 7 * slots[0].nbytes, 1)
    assert [slot.index for slot in again] == [1, 2, 0]
    assert seen.isdisjoint(slot.generation for slot in again)
    with pytest.raises(AssertionError, match="evicted or dropped"):
        _ = slots[0].modules


# Eviction, holds and pins


def test_the_least_recently_used_goes():
    pool = AdapterPool(device=CPU, capacity=3 * ROOM)
    for i in range(3):
        put(pool, str(i))
    pool.get("0")
    put(pool, "3")
    assert pool.keys == ["2", "0", "3"]
    put(pool, "4", keep={"2", "0"})
    assert pool.keys == ["2", "0", "4"]


def test_held_and_pinned_slots_stay():
    pool = AdapterPool(device=CPU, capacity=3 * ROOM)
    held, _, pinned = (put(pool, str(i)) for i in range(3))
    pool.pin("2")
    with pool.hold([held]), pool.hold([held, held]):
        put(pool, "3")
        assert pool.keys == ["0", "2", "3"]
        with pytest.raises(PoolFullError, match=f"'tenant-4' needs {ROOM:,} bytes beside {3 * ROOM:,} bytes that must"):
            put(pool, "4", keep={"3"})
        assert pool.keys == ["0", "2", "3"]
        put(pool, "4")
        assert pool.keys == ["0", "2", "4"]
    put(pool, "5")
    assert pool.keys == ["2", "4", "5"] and pinned.resident and not held.resident
    pool.unpin("2")
    pool.unpin("zebra")
    put(pool, "6")
    assert pool.keys == ["4", "5", "6"] and not pinned.resident


@pytest.mark.parametrize("capacity", [None, 3 * ROOM])
def test_a_dropped_slot_keeps_its_memory_while_it_is_held(capacity):
    pool = AdapterPool(device=CPU, capacity=capacity)
    slot = put(pool, "0")
    with pool.hold([slot]):
        pool.drop("0")
        assert pool.keys == [] and pool.nbytes == slot.nbytes and slot.resident
        other = put(pool, "0")
        assert other is not slot and other.index == 1
        put(pool, "1")
        check(pool, {str(i): extent_of(i) for i in range(2)})
        if capacity:
            with pytest.raises(PoolFullError):
                put(pool, "2", keep={"0", "1"})
    assert not slot.resident and pool.nbytes == 2 * slot.nbytes
    assert put(pool, "2").index == 0


def test_a_hold_ends_with_an_exception():
    pool = AdapterPool(device=CPU, capacity=ROOM)
    with pytest.raises(RuntimeError), pool.hold([put(pool, "0")]):
        raise RuntimeError
    put(pool, "1")
    assert pool.keys == ["1"]


# What does not fit, and what fails


def test_an_adapter_larger_than_the_pool_is_refused():
    pool = AdapterPool(device=CPU, capacity=ROOM)
    put(pool, "0")
    calls = []
    with pytest.raises(PoolFullError, match="adapter_memory"):
        put(pool, "wide", reader_of(extent_of(width=99), calls))
    assert pool.keys == ["0"] and not calls
    with pytest.raises(PoolFullError):
        put(AdapterPool(device=CPU, capacity=0), "0")


@pytest.mark.parametrize("host_capacity", [None, 1 << 20])
def test_a_failed_read_leaves_all_as_it_was(host_capacity):
    pool = AdapterPool(device=CPU, capacity=2 * ROOM, host_capacity=host_capacity)
    put(pool, "0"), put(pool, "1")
    generation = pool.generation

    def read_into(buffer: torch.Tensor) -> Extent:
        raise BankCorruptedError("the file is too short")

    for _ in range(2):
        with pytest.raises(BankCorruptedError):
            put(pool, "2", ExtentReader(extent_of().layout, torch.float32, read_into))
    assert pool.keys == ["0", "1"] and pool.generation == generation
    check(pool, {str(i): extent_of(i) for i in range(2)})


def test_a_failed_copy_leaves_no_slot_behind(monkeypatch):
    pool = AdapterPool(device=CPU, capacity=2 * ROOM)
    put(pool, "0")

    def fail(*_):
        raise RuntimeError("no copy")

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="no copy"):
        patch.setattr(pool._transfers, "load", fail)
        put(pool, "1")
    check(pool, {"0": extent_of(0)})
    assert pool.keys == ["0"] and put(pool, "1").index == 1


def test_a_device_without_room_for_the_limit_is_told_by_its_name(monkeypatch):
    pool = AdapterPool(device=CPU, capacity=1 << 40)

    def fail(nbytes):
        raise torch.OutOfMemoryError("out of memory")

    with monkeypatch.context() as patch, pytest.raises(PoolFullError, match="cpu has no 1,099,511,627,776 bytes"):
        patch.setattr(pool._transfers, "arena", fail)
        put(pool, "0")
    assert pool.keys == [] and pool.nbytes == 0


# Compaction


def fragmented(device=CPU):
    """A pool of six units, full of one-unit slots, whose first, third and fifth are then dropped: no hole of two."""
    pool = AdapterPool(device=device, capacity=6 * ROOM)
    for i in range(6):
        put(pool, str(i))
    for key in ("0", "2", "4"):
        pool.drop(key)
    return pool


WIDE = extent_of(50, rank=8)  # twice the bytes of A and B, so two units at most


def test_slots_are_moved_together():
    pool = fragmented()
    first, last = pool.get("1"), pool.get("5")
    before = {slot: (slot.address, slot.generation, slot.modules) for slot in (first, last)}
    wide = put(pool, "50", WIDE)
    assert ROOM < wide.nbytes <= 2 * ROOM
    assert pool.keys == ["3", "1", "5", "50"], "nothing had to be evicted"
    moved = [slot for slot in before if (slot.address, slot.generation) != before[slot][:2]]
    assert moved == [first]
    assert first.address == pool._memory.data_ptr() and first.modules is not before[first][2]
    check(pool, {str(i): extent_of(i) for i in range(6)} | {"50": WIDE})


def test_held_slots_do_not_move():
    pool = fragmented()
    slots = {key: pool.get(key) for key in pool.keys}
    places = {key: slot.address for key, slot in slots.items()}
    with pool.hold([slots["1"], slots["3"]]):
        put(pool, "50", WIDE)  # 5 goes, though the bytes would have sufficed
        assert pool.keys == ["1", "3", "50"]
        assert all(slots[key].address == places[key] for key in ("1", "3"))
        check(pool, {str(i): extent_of(i) for i in range(6)} | {"50": WIDE})
    pool = fragmented()
    with pool.hold([pool.get(key) for key in ("1", "3", "5")]):
        with pytest.raises(PoolFullError, match=f"in pieces of at most {ROOM:,}, between adapters that running"):
            put(pool, "50", WIDE)
        assert pool.keys == ["1", "3", "5"]


@pytest.mark.parametrize(("seed", "dtype"), [(0, None), (1, torch.bfloat16), (2, None)], ids=str)
def test_thousands_of_random_loads(seed, dtype, monkeypatch):
    pick = random.Random(seed)
    sources = {
        str(key): extent_of(
            key,
            rank=pick.choice([1, 2, 4, 8, 16, 64]),
            width=pick.choice([8, 24, 96]),
            layers=pick.randint(1, 3),
            dtype=pick.choice([torch.float32, torch.bfloat16]),
        )
        for key in range(120)
    }
    total = sum(extent.layout.nbytes(dtype or extent.dtype) for extent in sources.values())
    pool = AdapterPool(device=CPU, dtype=dtype, capacity=total // 3, host_capacity=total // 4)
    monkeypatch.setattr("lorakit.runtime.transfers.STAGING", 4096)  # so that moves take every way
    held, pins, places = [], set(), {}
    counts = dict.fromkeys(["move", "full", "load"], 0)
    carry_out = pool._transfers.move

    def move(memory, moves, accesses):
        counts["move"] += len(moves)
        return carry_out(memory, moves, accesses)

    monkeypatch.setattr(pool._transfers, "move", move)
    for step in range(3000):
        key = str(pick.randrange(len(sources)))
        action = pick.random()
        if action < 0.72:
            slot = pool.get(key)
            if slot is None:
                before = pool.keys
                try:
                    slot = put(pool, key, pick.choice([sources[key], reader_of(sources[key])]))
                    counts["load"] += 1
                except PoolFullError:
                    counts["full"] += 1
                    assert pool.keys == before
        elif action < 0.82 and pool.keys:
            slots = [pool._slots[key] for key in pick.sample(pool.keys, min(len(pool.keys), pick.randint(1, 4)))]
            pool.acquire(slots)
            held.append(slots)
            places |= {slot: slot.address for slot in slots}
        elif action < 0.92 and held:
            slots = held.pop(pick.randrange(len(held)))
            pool.release(slots)
            for slot in slots:
                if not slot.holds:
                    del places[slot]
        elif action < 0.95:
            pool.drop(key)
            pins.discard(key)
        elif action < 0.97 and pool.keys:
            pins.add(pick.choice(pool.keys))
            for key in pins:
                pool.pin(key)
        elif len(pins) > 5:
            pool.unpin(pins.pop())
        assert all(slot.resident and slot.address == address for slot, address in places.items())
        assert pins <= set(pool.keys)
        if step % 250 == 0:
            check(pool, sources)
    check(pool, sources)
    assert min(counts.values()) > 10, counts
    for slots in held:
        pool.release(slots)
    pool.keep_only(())
    assert pool.nbytes == 0 and pool._arena.free == pool._arena.capacity and not pool._leaving


# On a GPU. A long kernel on the compute stream stands for a step of the model.

STEP = 2_000_000_000
"""Clock cycles that the long kernel takes: about a second."""

CUDA = torch.device("cuda")

DEVICES = [CPU, pytest.param(CUDA, marks=pytest.mark.gpu)]
"""For tests that hold on any device, and that have an order to get wrong on a GPU."""


@contextmanager
def copies_delayed(pool):
    """What is copied inside comes after a long kernel."""
    if pool.device.type == "cuda":
        with torch.cuda.stream(pool._transfers._stream):
            torch.cuda._sleep(STEP // 4)
    yield


@contextmanager
def step_running(device, pool, keys):
    """Gives what a step that still runs reads of these adapters, after a long kernel."""
    slots = [pool.get(key) for key in keys]
    with pool.hold(slots):
        if device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda._sleep(STEP)
        reads = {slot.key: slot.memory.clone() for slot in slots}
    end = torch.cuda.current_stream().record_event() if device.type == "cuda" else None
    yield reads
    assert end is None or not end.query(), "the host waited for the step"


def big(seed):
    return extent_of(seed, rank=64, width=4096, layers=4)


@pytest.mark.gpu
@pytest.mark.parametrize("capacity", [None, 100_000])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
def test_a_load_is_one_copy_from_pinned_memory(capacity, dtype, monkeypatch):
    pool = AdapterPool(device=CUDA, dtype=dtype, capacity=capacity)
    copies = []
    load = pool._transfers.load
    monkeypatch.setattr(
        pool._transfers, "load", lambda *args: (copies.append((args[0].numel(), args[1].is_pinned())), load(*args))
    )
    extent = extent_of(1, rank=5)
    slot = put(pool, "1", reader_of(extent))
    assert copies == [(slot.nbytes, True)] and slot.address % 256 == 0
    with pool.hold([slot]):
        assert torch.equal(content(slot), bytes_of(extent, dtype))
    torch.cuda.synchronize()
    assert slot.ready() and not pool.host.get("1").busy


@pytest.mark.gpu
@pytest.mark.parametrize("capacity", [None, 1 << 28])
def test_readers_wait_for_a_late_copy(capacity):
    pool = AdapterPool(device=CUDA, capacity=capacity)
    pool.prefetch("1", big(1))  # pinned memory is taken before the long kernel: taking it may wait for the device
    put(pool, "0")
    torch.cuda.synchronize()
    with torch.cuda.stream(pool._transfers._stream):
        torch.cuda._sleep(STEP)
    slot = put(pool, "1", big(1))
    assert not slot.ready() and pool.host.get("1").busy
    with pool.hold([slot]):
        read = slot.memory.clone()
    assert torch.equal(read.cpu(), bytes_of(big(1))) and slot.ready()


@pytest.mark.gpu
@pytest.mark.parametrize("capacity", [None, 1 << 28])
def test_a_load_into_memory_that_nobody_reads_does_not_wait_for_the_step(capacity):
    pool = AdapterPool(device=CUDA, capacity=capacity)
    pool.prefetch("1", big(1))
    slot = put(pool, "0", big(0))
    put(pool, "2", big(2))
    torch.cuda.synchronize()
    pool.drop("2")
    with pool.hold([slot]):
        torch.cuda._sleep(STEP)
        read = slot.memory.clone()
    end = torch.cuda.current_stream().record_event()
    other = put(pool, "1", big(1))
    other._access.arrival.synchronize()
    assert not end.query(), "the load waited for the step"
    with pool.hold([other]):
        assert torch.equal(content(other), bytes_of(big(1)))
    assert torch.equal(read.cpu(), bytes_of(big(0)))


@pytest.mark.gpu
@pytest.mark.parametrize("told", [True, False], ids=["hold", "wait alone"])
def test_memory_is_not_overwritten_before_its_readers_have_ended(told):
    pool = AdapterPool(device=CUDA, capacity=aligned(big(0).nbytes))
    pool.prefetch("1", big(1))
    slot = put(pool, "0", big(0))
    torch.cuda.synchronize()
    pool.wait([slot])
    if told:
        pool.acquire([slot])
    torch.cuda._sleep(STEP)
    read = slot.memory.clone()
    end = torch.cuda.current_stream().record_event()
    if told:
        pool.release([slot])
    address = slot.address
    other = put(pool, "1", big(1))
    assert other.address == address and not slot.resident
    assert not end.query(), "the host waited for the step"
    with pool.hold([other]):
        after = other.memory.clone()
    assert torch.equal(read.cpu(), bytes_of(big(0)))
    assert torch.equal(after.cpu(), bytes_of(big(1)))


@pytest.mark.gpu
def test_memory_of_its_own_is_not_overwritten_before_its_readers_have_ended():
    pool = AdapterPool(device=CUDA)
    for i in range(4):
        pool.prefetch(str(i), big(i))
    slot = put(pool, "0", big(0))
    torch.cuda.synchronize()
    with pool.hold([slot]):
        torch.cuda._sleep(STEP)
        read = slot.memory.clone()
    pool.drop("0")
    others = [put(pool, str(i), big(i)) for i in range(1, 4)]
    with pool.hold(others):
        after = [other.memory.clone() for other in others]
    assert torch.equal(read.cpu(), bytes_of(big(0)))
    for i, tensor in enumerate(after, start=1):
        assert torch.equal(tensor.cpu(), bytes_of(big(i)))


@pytest.mark.parametrize("device", DEVICES)
def test_moves_wait_for_readers_and_for_pending_loads(device):
    pool = AdapterPool(device=device, capacity=6 * ROOM)
    wider = extent_of(51, rank=12)
    sources = {str(i): extent_of(i) for i in range(6)} | {"50": WIDE, "51": wider}
    for key, extent in sources.items():
        pool.prefetch(key, extent)
    put(pool, "0")
    with copies_delayed(pool):
        for i in range(1, 6):
            put(pool, str(i))
        for key in ("0", "2", "4"):
            pool.drop(key)
        moved = pool.get("1")
        address = moved.address
        put(pool, "50", WIDE)
        assert moved.address == address - ROOM
    check(pool, sources)
    # 1, 50, 50, 3, nothing, 5: without 50, three units are free but not in one piece.
    moved = pool.get("3")
    address = moved.address
    with step_running(device, pool, ["1", "3", "5", "50"]) as reads:
        pool.drop("50")
        put(pool, "51", wider)
        assert moved.address == address - 2 * ROOM
        with pool.hold(pool._slots.values()):
            after = {slot.key: slot.memory.clone() for slot in pool._slots.values()}
    assert reads.keys() == {"1", "3", "5", "50"} and after.keys() == {"1", "3", "5", "51"}
    for key, read in [*reads.items(), *after.items()]:
        assert torch.equal(read.cpu(), bytes_of(sources[key])), key
    check(pool, sources)


# Pools that do the same


@pytest.mark.parametrize("seed", range(3))
def test_a_pool_that_replays_another_is_laid_out_like_it(seed):
    pick = random.Random(seed)
    sources = {str(key): extent_of(key, rank=1 + key % 7) for key in range(12)}
    leader, follower = (AdapterPool(device=CPU, capacity=6 * ROOM) for _ in range(2))
    put(follower, "4")  # what was there before
    for pool in (leader, follower):
        pool.begin_anew()
    leader.journal = []
    held = []
    read = []

    def reader(operation):
        read.append(operation.name)
        return follower.host.read(sources[operation.key])

    def layout(pool):
        slots = [*pool._slots.values(), *sorted(pool._leaving, key=lambda slot: slot.serial)]
        return [(slot.key, slot.serial, slot.index, slot._offset, slot.holds) for slot in slots]

    puts = 0
    for _ in range(400):
        action, key = pick.random(), pick.choice(list(sources))
        if action < 0.5:
            with suppress(PoolFullError):
                puts += leader.get(key) is None
                slot = put(leader, key, sources[key])
                if pick.random() < 0.4 and len(held) < 4:
                    leader.acquire([slot])
                    held.append(slot)
        elif action < 0.75 and held:
            leader.release([held.pop(pick.randrange(len(held)))])
        elif action < 0.85:
            leader.drop(key)
        else:
            leader.get(key)
        if pick.random() < 0.3:  # some at a time
            operations, leader.journal = leader.journal, []
            for operation in operations:
                slot = follower.replay(operation, reader)
                assert (slot is not None) == (operation.kind == "acquire")
                assert slot is None or slot.serial == operation.serial
            assert layout(follower) == layout(leader)
            check(follower, sources)
    assert puts > 50 and all(name.startswith("tenant-") for name in read)
    follower.release_all()
    assert not follower.held


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("staging", [1024, 4 << 20])
def test_random_loads_beside_running_steps(device, staging, monkeypatch):
    monkeypatch.setattr("lorakit.runtime.transfers.STAGING", staging)
    pick = random.Random(0)
    sources = {
        str(key): extent_of(key, rank=pick.choice([1, 8, 64]), width=pick.choice([24, 256]), layers=3)
        for key in range(40)
    }
    total = sum(extent.nbytes for extent in sources.values())
    pool = AdapterPool(device=device, capacity=total // 3, host_capacity=total // 2)
    reads = []
    moves = 0
    for step in range(400):
        keys = [str(pick.randrange(len(sources))) for _ in range(pick.randint(1, 3))]
        before = {slot: slot.address for slot in pool._slots.values()}
        try:
            slots = [pool.get(key) or put(pool, key, sources[key], keep=keys) for key in keys]
        except PoolFullError:
            continue
        moves += sum(slot.resident and slot.address != address for slot, address in before.items())
        with pool.hold(slots):
            if device.type == "cuda":
                torch.cuda._sleep(pick.choice([0, 1_000_000, 5_000_000]))
            reads += [(slot.key, slot.memory.clone()) for slot in slots]
        if step % 50 == 49:
            for key, read in reads:
                assert torch.equal(read.cpu(), bytes_of(sources[key])), key
            reads = []
            check(pool, sources)
    assert moves > 10
