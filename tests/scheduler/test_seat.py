"""Who leads: one server at a time, and none that another one has superseded."""

import pytest

from lorakit.errors import EngineBusyError, EngineStoppedError, SupersededError
from lorakit.scheduler.seat import Seat


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


def test_one_leads_at_a_time(clock):
    seat = Seat(10.0, clock=clock)
    first = seat.take()
    clock.now += 9
    with pytest.raises(EngineBusyError, match="another server uses these replicas") as caught:
        seat.take()
    assert caught.value.retry_after == 1
    seat.check(first)
    clock.now += 9
    with pytest.raises(EngineBusyError):
        seat.take()


def test_who_was_away_for_too_long_is_superseded(clock):
    seat = Seat(10.0, clock=clock)
    first = seat.take()
    clock.now += 11
    seat.check(first)  # nobody else came
    clock.now += 11
    second = seat.take()
    assert second > first
    for word in (seat.check, seat.leave):
        with pytest.raises(SupersededError, match="taken over"):
            word(first)
    seat.check(second)
    assert issubclass(SupersededError, EngineStoppedError)


def test_who_leaves_makes_room_at_once(clock):
    seat = Seat(10.0, clock=clock)
    first = seat.take()
    seat.leave(first)
    assert seat.take() > first


def test_a_seat_in_the_place_of_one_that_broke_down_waits_for_who_leads(clock):
    leads = Seat(10.0, clock=clock).take()
    seat = Seat(10.0, taken=True, clock=clock)
    with pytest.raises(EngineBusyError):
        seat.take()
    seat.check(leads)
    with pytest.raises(SupersededError):
        seat.check(leads - 1)
    clock.now += 11
    assert seat.take() > leads
