"""The batch right now, drawn: rows by adapter, memory by tier, and who gets how many tokens."""

from __future__ import annotations

import threading
import time
from html import escape
from typing import NamedTuple

from lorakit.adapters.sizes import human_bytes
from lorakit.engine.stats import EngineStats, Tier

from .stage import BASE, Stage

_SHOWN = 64
_HUES = (212, 28, 142, 282, 0, 184, 48, 326, 98, 250)


class Pulse(NamedTuple):
    """What an engine does, over the last moments.

    Attributes:
        stats: now.
        forwards: a second.
        segments: adapters of a forward, the base being one; 0 if there was none.
        rates: tokens a second of each tenant that got any.
    """

    stats: EngineStats
    forwards: float
    segments: float
    rates: dict[str, float]


class PulseTaker:
    """Looks at an engine, at most so often, however many visitors ask."""

    def __init__(self, stage: Stage, *, every: float = 0.4) -> None:
        """Has looked once.

        Args:
            stage: whose engine.
            every: seconds between two looks.
        """
        self._stage, self._every = stage, every
        self._lock = threading.Lock()
        self._when, self._last = time.monotonic(), stage.engine.stats()
        self._pulse = Pulse(self._last, 0.0, 0.0, {})

    def take(self) -> Pulse:
        """The latest."""
        with self._lock:
            now = time.monotonic()
            if now - self._when >= self._every:
                stats, seconds = self._stage.engine.stats(), now - self._when
                steps = stats.steps - self._last.steps
                before = self._last.tenants
                had = {
                    name: used.generated_tokens - (before[name].generated_tokens if name in before else 0)
                    for name, used in stats.tenants.items()
                }
                segments = (stats.segments - self._last.segments) / steps if steps > 0 else 0.0
                rates = {name: count / seconds for name, count in had.items() if count > 0}
                self._when, self._last = now, stats
                self._pulse = Pulse(stats, max(0, steps) / seconds, segments, rates)
            return self._pulse


def colour(name: str, tenants: list[str]) -> str:
    """A tenant's colour, the same wherever it is drawn."""
    if name == BASE:
        return "hsl(215 8% 48%)"
    place = tenants.index(name) - 1 if name in tenants else 0
    return f"hsl({_HUES[place % len(_HUES)]} 62% 42%)"


def meter(percent: float, colour: str | None = None) -> str:
    """A bar that is filled so far; None: in the page's own colour."""
    fill = f"width:{percent:.0f}%" + (f";background:{colour}" if colour else "")
    return f'<span class="meter"><b style="{fill}"></b></span>'


def draw(pulse: Pulse, stage: Stage) -> str:
    """All of it, as HTML."""
    return (
        f'<div class="batch">{_rows(pulse, stage.tenants)}{_memory(pulse, stage)}{_tokens(pulse, stage.tenants)}</div>'
    )


def _rows(pulse: Pulse, tenants: list[str]) -> str:
    running = {name or BASE: count for name, count in pulse.stats.running.items()}
    waiting = sum(pulse.stats.waiting.values())
    boxes = [
        f'<i style="background:{colour(name, tenants)}" title="{escape(name)}"></i>'
        for name in sorted(running, key=lambda name: tenants.index(name) if name in tenants else 0)
        for _ in range(running[name])
    ]
    more = f" +{len(boxes) - _SHOWN}" if len(boxes) > _SHOWN else ""
    rows, adapters = len(boxes), len([name for name in running if name != BASE])
    told = (
        f"{rows} row{'s' * (rows != 1)} · {adapters} adapter{'s' * (adapters != 1)}"
        + (f" · {waiting} waiting" if waiting else "")
        + (f" · {pulse.forwards:.0f} forwards/s, {pulse.segments:.1f} segments each" if pulse.forwards else "")
        if rows or waiting
        else "idle: ask something"
    )
    return f'<section><h4>One batch</h4><div class="rows">{"".join(boxes[:_SHOWN])}{more}</div><p>{told}</p></section>'


def _memory(pulse: Pulse, stage: Stage) -> str:
    stats = pulse.stats
    where = "GPU" if stage.model.device.type == "cuda" else "device (CPU)"
    bars = _bar(where, stats.device) + (_bar("host cache", stats.host) if stats.host.limit else "")
    loads = stats.loads
    told = f"{loads.copies} loads · {loads.evictions} evictions · {len(stage.tenants) - 1} tenants known"
    return f"<section><h4>Adapters in memory</h4>{bars}<p>{told}</p></section>"


def _bar(name: str, tier: Tier) -> str:
    share = 100 * tier.nbytes / tier.limit if tier.limit else 0.0
    limit = f" of {human_bytes(tier.limit)}" if tier.limit else ""
    told = f"{name}: {tier.adapters} adapters, {human_bytes(tier.nbytes)}{limit}"
    return f'<div class="tier"><span>{told}</span>{meter(min(100, share)) if tier.limit else ""}</div>'


def _tokens(pulse: Pulse, tenants: list[str]) -> str:
    most = max(pulse.rates.values(), default=1.0)
    lines = [
        f'<div class="rate"><span>{escape(name)}</span>{meter(100 * rate / most, colour(name, tenants))}'
        f"<span>{rate:.1f}/s</span></div>"
        for name, rate in sorted(pulse.rates.items())
    ]
    return f"<section><h4>Tokens a second</h4>{''.join(lines) or '<p>none</p>'}</section>"
