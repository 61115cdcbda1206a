"""The arena against a plain model of it: a list of extents, and bytes that the moves really move."""

import random

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from lorakit.runtime.arena import ALIGNMENT, Arena, aligned

UNITS = 64


def holes_of(arena):
    """(offset, size) of every hole, from the extents alone."""
    place, holes = 0, []
    for offset, size in [*arena.extents.items(), (arena.capacity, 0)]:
        assert offset >= place, "extents overlap"
        if offset > place:
            holes.append((place, offset - place))
        place = offset + size
    return holes


class ArenaMachine(RuleBasedStateMachine):
    """Every extent's bytes hold a mark of its own, one for each unit of `ALIGNMENT` bytes."""

    def __init__(self):
        super().__init__()
        self.arena = Arena(UNITS * ALIGNMENT)
        self.marks = {}
        self.memory = [None] * UNITS
        self.next = 0

    def paint(self, offset, size):
        self.next += 1
        self.marks[offset] = self.next
        for unit in range(offset // ALIGNMENT, (offset + size) // ALIGNMENT):
            self.memory[unit] = (self.next, unit - offset // ALIGNMENT)

    def pick(self, choice):
        return sorted(self.marks)[choice % len(self.marks)]

    @rule(nbytes=st.integers(0, UNITS * ALIGNMENT // 3))
    def allocate(self, nbytes):
        fitting = [(size, offset) for offset, size in holes_of(self.arena) if size >= aligned(nbytes)]
        offset = self.arena.allocate(nbytes)
        assert offset == (min(fitting)[1] if fitting else None)
        if offset is not None:
            self.paint(offset, aligned(nbytes))

    @precondition(lambda self: self.marks)
    @rule(choice=st.integers(0, UNITS))
    def release(self, choice):
        offset = self.pick(choice)
        del self.marks[offset]
        self.arena.release(offset)

    @rule(nbytes=st.integers(1, UNITS * ALIGNMENT), fixed=st.sets(st.integers(0, UNITS - 1), max_size=3))
    def compact(self, nbytes, fixed):
        fixed = {self.pick(choice) for choice in fixed} if self.marks else set()
        before = self.arena.extents
        moves = self.arena.compaction(nbytes, fixed)
        assert self.arena.extents == before, "a plan changes nothing"
        if not fixed:
            assert (moves is None) == (self.arena.free < aligned(nbytes))
        if moves is None:
            assert self.arena.largest_hole < aligned(nbytes)
            return
        for source, target, size in moves:
            assert source not in fixed and target < source and before[source] == size
            # One unit after another, as a copy without a buffer would do it.
            for unit in range(size // ALIGNMENT):
                self.memory[target // ALIGNMENT + unit] = self.memory[source // ALIGNMENT + unit]
            self.marks[target] = self.marks.pop(source)
        self.arena.move(moves)
        assert self.arena.largest_hole >= aligned(nbytes)

    @invariant()
    def contents_are_whole(self):
        assert self.arena.extents.keys() == self.marks.keys()
        for offset, size in self.arena.extents.items():
            begin = offset // ALIGNMENT
            expected = [(self.marks[offset], unit) for unit in range(size // ALIGNMENT)]
            assert self.memory[begin : begin + size // ALIGNMENT] == expected

    @invariant()
    def accounts_are_exact(self):
        holes = holes_of(self.arena)
        assert self.arena.free == sum(size for _, size in holes)
        assert self.arena.free + sum(self.arena.extents.values()) == self.arena.capacity
        assert self.arena.largest_hole == max((size for _, size in holes), default=0)
        assert all(offset % ALIGNMENT == size % ALIGNMENT == 0 for offset, size in holes)

    @invariant()
    def a_copy_is_independent(self):
        copy = self.arena.copy()
        before = self.arena.extents, self.arena.free
        assert (copy.extents, copy.free, copy.largest_hole) == (*before, self.arena.largest_hole)
        copy.allocate(1)
        assert (self.arena.extents, self.arena.free) == before


TestArenaMachine = ArenaMachine.TestCase
TestArenaMachine.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)


def test_sizes_are_rounded_up_and_never_zero():
    assert [aligned(n) for n in (0, 1, 256, 257)] == [256, 256, 256, 512]
    assert Arena(1).capacity == 256 and Arena(0).capacity == Arena(-5).capacity == 0
    assert Arena(0).allocate(1) is None


def test_the_smallest_hole_that_fits_is_taken():
    arena = Arena(20 * 256)
    extents = [arena.allocate(size * 256) for size in (5, 1, 2, 1, 3, 1)]
    for offset in (extents[0], extents[2], extents[4]):
        arena.release(offset)
    assert [arena.allocate(size * 256) for size in (3, 2, 4)] == [9 * 256, 6 * 256, 0]


def test_compaction_moves_as_few_bytes_as_it_can():
    arena = Arena(16 * 256)
    extents = [arena.allocate(size * 256) for size in (1, 6, 1, 1, 1, 6)]
    for place in (0, 2, 4):
        arena.release(extents[place])
    # Two units: past the extent of one unit between the second and the third hole, not past that of six.
    assert arena.compaction(2 * 256) == [(8 * 256, 7 * 256, 256)]
    assert arena.compaction(2 * 256, fixed={8 * 256}) is not None
    assert arena.compaction(2 * 256, fixed={8 * 256, 256}) is None
    assert arena.compaction(3 * 256) == [(256, 0, 6 * 256), (8 * 256, 6 * 256, 256)]
    assert arena.compaction(256) == []
    assert arena.compaction(4 * 256) is None


def test_thousands_of_extents():
    pick = random.Random(0)
    arena = Arena(4000 * 256)
    taken = []
    compactions = 0
    for _ in range(8_000):
        nbytes = pick.randint(1, 8 * 256)
        offset = arena.allocate(nbytes)
        if offset is None and arena.free >= aligned(nbytes):
            moves = arena.compaction(nbytes)
            arena.move(moves)
            places = {move.source: move.target for move in moves}
            taken = [places.get(offset, offset) for offset in taken]
            compactions += 1
            offset = arena.allocate(nbytes)
            assert offset is not None
        if offset is None:
            for _ in range(pick.randint(1, 20)):
                arena.release(taken.pop(pick.randrange(len(taken))))
        else:
            taken.append(offset)
    assert sorted(taken) == list(arena.extents)
    assert compactions > 20
    for offset in taken:
        arena.release(offset)
    assert arena.largest_hole == arena.free == arena.capacity
