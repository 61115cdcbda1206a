"""Tests that are marked as a group run on one worker: Ray, other processes and browsers are not started by several."""

import os

import pytest


@pytest.mark.xdist_group("groups")
@pytest.mark.parametrize("place", range(6))
def test_a_group_stays_on_one_worker(place, tmp_path_factory):
    worker = os.environ.get("PYTEST_XDIST_WORKER")
    if worker is None:
        pytest.skip("one process runs all tests")
    seen = tmp_path_factory.getbasetemp().parent / "workers of a group"
    with seen.open("a") as file:
        file.write(f"{worker}\n")
    assert set(seen.read_text().split()) == {worker}
