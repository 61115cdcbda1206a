"""Deficit round robin over tenants, by tokens (Shreedhar and Varghese, SIGCOMM 1995).

Tenants with waiting requests stand in a ring. A tenant's turn adds its quantum to its deficit, and its oldest requests
are chosen while the deficit covers their cost in tokens; what is left over is kept for its next turn, unless nothing of
its waits. So tenants that always have work are given tokens in the ratio of their weights, whatever the sizes and
numbers of their requests, and a newcomer waits for one turn of the others.

Pure Python: knows tenants, costs and keys; no request, no model.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field

QUANTUM = 1024
"""Tokens of a turn, about a request's: with fewer a request waits for several turns, with more turns are longer."""


Room = Callable[[Hashable, Hashable], bool]


@dataclass
class _Tenant:
    """One tenant of the ring.

    Attributes:
        weight: of its quantum.
        deficit: tokens that its next requests may cost.
        in_turn: whether this turn's quantum was added already.
        waiting: key → cost in tokens, oldest first.
    """

    weight: float
    deficit: float = 0.0
    in_turn: bool = False
    waiting: OrderedDict[Hashable, int] = field(default_factory=OrderedDict)


class FairQueue:
    """Requests that wait, and whose turn it is."""

    def __init__(self, quantum: int = QUANTUM) -> None:
        """Makes an empty queue.

        Args:
            quantum: tokens that a turn gives a tenant of weight 1.
        """
        assert quantum > 0
        self._quantum = quantum
        self._ring: OrderedDict[Hashable, _Tenant] = OrderedDict()
        self._owners: dict[Hashable, Hashable] = {}

    def __len__(self) -> int:
        return len(self._owners)

    def __contains__(self, key: Hashable) -> bool:
        return key in self._owners

    def add(self, key: Hashable, tenant: Hashable, cost: int, weight: float = 1.0) -> None:
        """Lets a request wait behind those of its tenant; a tenant that had none goes to the ring's end.

        Args:
            key: the request.
            tenant: whose it is.
            cost: what it may take, in tokens: its prompt and the most that it may generate.
            weight: the tenant's; the last one said counts.
        """
        assert key not in self._owners and cost >= 0 and weight > 0
        entry = self._ring.setdefault(tenant, _Tenant(weight))
        entry.weight = weight
        entry.waiting[key] = cost
        self._owners[key] = tenant

    def remove(self, key: Hashable) -> bool:
        """Takes a request out that will not be served, at no charge; False if it does not wait."""
        if key not in self._owners:
            return False
        self._pop(key)
        return True

    def choose(self, room: Room | None = None) -> Hashable | None:
        """Takes out the request whose turn it is, and charges its tenant.

        Args:
            room: tenant and its oldest request → whether that may run; a tenant without room is passed over, and
                gathers no deficit meanwhile. None: all have.

        Returns:
            The request, or None where none may run.
        """
        passed = fruitless = 0
        while passed < len(self._ring):
            tenant, entry = next(iter(self._ring.items()))
            key, cost = next(iter(entry.waiting.items()))
            if room is not None and not room(tenant, key):
                passed += 1
                self._end_turn(tenant, entry)
                continue
            if not entry.in_turn:
                entry.in_turn = True
                entry.deficit += self._quantum * entry.weight
            if cost <= entry.deficit:
                entry.deficit -= cost
                self._pop(key)
                return key
            self._end_turn(tenant, entry)
            passed, fruitless = 0, fruitless + 1
            if fruitless == len(self._ring):
                self._skip_turns(room)
        return None

    def refund(self, tenant: Hashable, tokens: int) -> None:
        """Gives back what a request was charged and did not take; a tenant with nothing waiting has no use for it."""
        if tenant in self._ring:
            self._ring[tenant].deficit += tokens

    def _pop(self, key: Hashable) -> None:
        tenant = self._owners.pop(key)
        entry = self._ring[tenant]
        del entry.waiting[key]
        if not entry.waiting:
            del self._ring[tenant]

    def _end_turn(self, tenant: Hashable, entry: _Tenant) -> None:
        entry.in_turn = False
        self._ring.move_to_end(tenant)

    def _skip_turns(self, room: Room | None) -> None:
        """After a round in which nobody's deficit sufficed: the rounds that would end so too, all at once."""
        ring = self._ring.items()
        entries = [entry for tenant, entry in ring if room is None or room(tenant, next(iter(entry.waiting)))]
        rounds = min(
            math.ceil((next(iter(entry.waiting.values())) - entry.deficit) / (self._quantum * entry.weight))
            for entry in entries
        )
        for entry in entries:
            entry.deficit += (rounds - 1) * self._quantum * entry.weight
