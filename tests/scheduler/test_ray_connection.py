"""A Ray cluster that begins with the server, or is there already."""

import os

import pytest

from lorakit.errors import EngineError

ray = pytest.importorskip("ray")

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("ray")]


@ray.remote
def niceness():
    return os.nice(0)


def test_engines_of_ones_own_machine_give_way_to_nobody(monkeypatch):
    from lorakit.scheduler.ray_cluster import connected

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with connected():
        assert ray.get(niceness.options(num_cpus=0).remote()) == os.nice(0)
    assert not ray.is_initialized()


def test_what_the_user_says_of_it_holds(monkeypatch):
    from lorakit.scheduler.ray_cluster import connected

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_worker_niceness", "3")
    with connected():
        assert ray.get(niceness.options(num_cpus=0).remote()) == os.nice(0) + 3


@pytest.mark.parametrize("by_variable", [False, True])
def test_a_cluster_that_is_not_there_is_named(monkeypatch, by_variable):
    from lorakit.scheduler.ray_cluster import connected

    address = "127.0.0.1:1"
    monkeypatch.setenv("RAY_ADDRESS", address) if by_variable else monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with (
        pytest.raises(EngineError, match=f"no Ray cluster answers at {address}"),
        connected(None if by_variable else address),
    ):
        pass
