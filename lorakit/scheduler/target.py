"""How many replicas are wanted, said until somebody has heard it."""

from __future__ import annotations

import asyncio
import logging

from lorakit.scheduler.links import Links
from lorakit.scheduler.loop import ENDS

_log = logging.getLogger(__name__)

_AGAIN = 0.5  # seconds after which it is said again


class Target:
    """A number of replicas. Of the cluster's loop.

    Attributes:
        count: how many are wanted.
    """

    def __init__(self, links: Links, count: int, patience: float) -> None:
        """Nothing is said yet.

        Args:
            links: are told.
            count: how many are wanted at first.
            patience: seconds to wait for an answer.
        """
        self.count = count
        self._links = links
        self._patience = patience
        self._speaks = False

    async def tell(self) -> None:
        """Says the newest number until it is heard.

        Raises:
            SupersededError: another cluster leads.
        """
        if self._speaks:
            return
        self._speaks = True
        try:
            told = -1
            while told != self.count:
                count = self.count
                try:
                    await asyncio.wait_for(self._links.scale(count), self._patience)
                    told = count
                except ENDS:
                    raise
                except Exception as error:  # noqa: BLE001 - it may be starting anew
                    _log.warning("replicas cannot be asked for: %s", error)
                    await asyncio.sleep(_AGAIN)
        finally:
            self._speaks = False
