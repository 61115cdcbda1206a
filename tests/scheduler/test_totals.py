"""Counters of many engines as one."""

from lorakit.engine.stats import EngineStats, Loads, Tier
from lorakit.scheduler.totals import Totals


def told(steps, reads=0, seconds=0.0):
    nothing = Tier(0, 0, None)
    loads = Loads(reads, seconds, 0, 0, 0.0, 0)
    return EngineStats("ready", 0, {}, {}, nothing, nothing, loads, 1.0, steps, 2 * steps, {})


def test_what_was_before_the_first_word_is_not_counted():
    totals = Totals()
    totals.note(told(100, 7), told(103, 8, 0.5))
    assert (totals.steps, totals.segments, totals.loads.reads, totals.loads.read_seconds) == (3, 6, 1, 0.5)


def test_an_engine_that_begins_anew_counts_from_0():
    totals = Totals()
    for before, now in ((0, 10), (10, 0), (0, 4), (4, 2)):
        totals.note(told(before), told(now))
    assert totals.steps == 16 and isinstance(totals.steps, int) and isinstance(totals.loads.evictions, int)
