"""Which captured forwards an engine keeps."""

import pytest

from lorakit.engine.graphs import Graphs, Group

BASE, ADAPTERS = Group(None, 0, False), Group("adapters", 0, False)


class Captured:
    """In the place of a CUDA graph."""

    def __init__(self):
        self.given_up = 0

    def replay(self):
        """Does nothing."""

    def reset(self):
        self.given_up += 1


@pytest.fixture
def three():
    return [Captured() for _ in range(3)]


def put(graphs, *found):
    for size, graph in enumerate(found):
        graphs.set_graph((size,), graph)


def test_each_group_has_its_own(three):
    graphs = Graphs(9)
    for group, graph in zip([BASE, ADAPTERS, BASE._replace(pair=1)], three, strict=True):
        graphs.group = group
        assert graphs.get_graph((64,)) is None
        graphs.set_graph((64,), graph)
    graphs.group = ADAPTERS
    assert graphs.get_graph((64,)) is three[1] and graphs.get_graph((64, 0)) is None
    assert len(graphs) == 3 and not any(graph.given_up for graph in three)


def test_the_one_replayed_the_longest_ago_goes(three):
    graphs = Graphs(2)
    put(graphs, *three[:2])
    assert graphs.get_graph((0,)) is three[0]
    graphs.set_graph((2,), three[2])
    assert [graph.given_up for graph in three] == [0, 1, 0]
    assert graphs.get_graph((1,)) is None and len(graphs) == 2
    assert graphs.get_graph((0,)) is three[0] and graphs.get_graph((2,)) is three[2]


def test_groups_that_nobody_wants_any_more_go(three):
    graphs = Graphs(9)
    put(graphs, *three[:1])
    graphs.group = ADAPTERS
    put(graphs, *three[1:])
    graphs.forget(lambda group: group.mode is not None)
    assert [graph.given_up for graph in three] == [0, 1, 1] and len(graphs) == 1


def test_all_go_with_their_engine(three):
    graphs = Graphs(9)
    put(graphs, *three)
    del graphs
    assert [graph.given_up for graph in three] == [1, 1, 1]
