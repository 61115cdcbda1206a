"""The schemes beside Punica's: what their routers choose, and when Ray Serve's autoscaler acts."""

from collections import Counter
from types import SimpleNamespace

import pytest

from lorakit.errors import ConfigError
from lorakit.scheduler.fleet import Fleet
from lorakit.scheduler.schemes import Autoscaler, GpuATenant, LeastLoaded, RayServe, RoundRobin, Routed
from lorakit.scheduler.snapshot import Limits, ReplicaView, RequestView

LIMITS = Limits(4, 100, 16)


def job(adapter=0):
    return SimpleNamespace(key=9, arrival=0, tokens=16, adapter=adapter, rank=16)


def replica(number, count, residents=(), adapter=0):
    held = tuple(RequestView(100 * number + place, 0.0, 16, adapter) for place in range(count))
    return ReplicaView(number, held, 100 - count, frozenset(residents))


def chosen(router, replicas, adapter=0, times=60):
    return {router(Fleet.of(4, replicas), job(adapter), -1, 0.0) for _ in range(times)}


def test_ray_serve_takes_a_holder_then_the_fewest_adapters_then_any():
    router = RayServe(LIMITS, seed=0)
    holders = [replica(0, 3, [7]), replica(1, 1, [7, 8]), replica(2, 0), replica(3, 0)]
    assert chosen(router, holders, 7) == {1}  # of two holders the one with fewer requests
    assert chosen(router, holders, 5) == {3}  # of two equals the higher id
    full = [replica(0, 4, [7]), replica(1, 2, [1, 2]), replica(2, 4)]
    assert chosen(router, full, 7, times=200) == {None, 1}  # of two random ones both may be full
    many = Fleet.of(4, [replica(number, number, [7]) for number in range(4)])
    drawn = Counter(router(many, job(7), -1, 0.0) for _ in range(600))
    # Of two of four: the emptiest wins three of six draws, the next two, the third one; the fullest wins none.
    assert set(drawn) == {0, 1, 2} and drawn[0] == pytest.approx(300, abs=60) and drawn[1] == pytest.approx(200, abs=60)


def test_round_robin_goes_round_and_passes_the_full():
    router, fleet = RoundRobin(LIMITS), [replica(0, 0), replica(1, 4), replica(2, 1)]
    assert [router(Fleet.of(4, fleet), job(), -1, 0.0) for _ in range(4)] == [0, 2, 0, 2]


def test_least_loaded_and_a_gpu_a_tenant():
    fleet = [replica(0, 2, adapter=5), replica(1, 1, adapter=6), replica(2, 3, adapter=7)]
    assert chosen(LeastLoaded(LIMITS), fleet) == {1}
    assert chosen(GpuATenant(LIMITS), fleet, 7) == {2}
    assert chosen(GpuATenant(LIMITS), fleet, 8) == {None}
    assert chosen(GpuATenant(LIMITS), [*fleet, replica(3, 0)], 8) == {3}


def test_the_autoscaler_waits_for_its_delays_and_averages():
    scheme = Routed(
        LeastLoaded(LIMITS), LIMITS, 8, Autoscaler(target=2.0, look_back=10.0, up_delay=5.0, down_delay=20.0)
    )
    changes = {second: scheme.ask_regularly(float(second), 8, 1, 1) for second in range(8)}
    assert {second: change for second, change in changes.items() if change} == {5: 3}
    changes = {second: scheme.ask_regularly(float(second), 0, 4, 4) for second in range(8, 60)}
    assert next(second for second, change in changes.items() if change) >= 28
    assert min(changes.values()) == -3  # one stays
    assert scheme.ask_regularly(100.0, 1000, 8, 8) == 0
    # GPUs that are still drained count against the most.
    assert max(scheme.ask_regularly(200.0 + second, 1000, 4, 7) for second in range(20)) == 1
    fixed = Routed(LeastLoaded(LIMITS), LIMITS, 8, None)
    assert fixed.initial == 8 and fixed.ask_regularly(0.0, 1000, 8, 8) == 0
    with pytest.raises(ConfigError, match="above 0"):
        Autoscaler(target=0.0)
    with pytest.raises(ConfigError, match="looks every"):
        Autoscaler(every=0.0)
