"""Who calls, what they may see, and how much they may ask for.

Without accounts everyone sees everything. With accounts a caller is a tenant, by its key: it sees the base, its own
adapters and public ones; of others it cannot tell that they are there. The administrator, by a key apart, sees all.
"""

from __future__ import annotations

import hmac
import json
import secrets
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from limits import RateLimitItemPerMinute
from limits.storage import MemoryStorage
from limits.strategies import MovingWindowRateLimiter

from lorakit.engine.handle import RequestHandle
from lorakit.server.accounts import Account, Accounts, today
from lorakit.server.faults import Fault
from lorakit.server.usage import UsageWriter

_DAY = 86400


@dataclass(frozen=True)
class Caller:
    """Who has sent a request.

    Attributes:
        account: the tenant's; None where there are no accounts, and for the administrator.
        accounts: where its adapters are known from; None: it may use all.
    """

    account: Account | None = None
    accounts: Accounts | None = None

    @property
    def name(self) -> str | None:
        """The tenant's name, if it is one."""
        return None if self.account is None else self.account.name

    def may_use(self, adapter: str) -> bool:
        """Whether it may use an adapter of that name, whether that is there or not."""
        return self.accounts is None or self.account is None or self.accounts.may_use(self.account.name, adapter)

    def usable(self, adapters: Iterable[str]) -> list[str]:
        """Those of some adapters that it may use."""
        if self.accounts is None or self.account is None:
            return list(adapters)
        allowed = self.accounts.adapters_of(self.account.name)
        return [name for name in adapters if name in allowed]

    def salt(self, own: str) -> str:
        """What keeps its prompts apart in the prefix cache: what others have asked must not show in how long it takes.

        Args:
            own: the salt that it asks for.
        """
        return own if self.account is None else json.dumps([self.account.name, own])


class Access:
    """The keys and the limits of a server."""

    def __init__(self, accounts: Accounts | None = None, *, admin_key: str | None = None) -> None:
        """Knows who may come in.

        Args:
            accounts: the tenants; None: everyone may use everything.
            admin_key: the administrator's key; None: there is no administrator.
        """
        self.accounts = accounts
        self._admin_key = admin_key
        self._salt = secrets.token_bytes(32)
        self._requests = MovingWindowRateLimiter(MemoryStorage())
        self._lock = threading.Lock()
        self._reserved: Counter[str] = Counter()
        self._usage = None if accounts is None else UsageWriter(accounts)

    def close(self) -> None:
        """Writes down what was used."""
        if self._usage is not None:
            self._usage.close()

    @property
    def has_admin(self) -> bool:
        """Whether there is an administrator."""
        return self._admin_key is not None

    def caller(self, headers: Mapping[str, str]) -> Caller:
        """Who sends these headers.

        Raises:
            Fault: the key is missing or wrong.
        """
        key = _bearer(headers)
        if self.accounts is None:
            return Caller()
        account = self.accounts.owner_of(key)
        if self._is_admin(key):
            return Caller()
        if account is None:
            what = "is wrong" if key else "is missing; send it as 'Authorization: Bearer KEY'"
            raise _unknown_key(f"the API key {what}.")
        return Caller(account, self.accounts)

    def check_admin(self, headers: Mapping[str, str]) -> None:
        """Lets the administrator pass.

        Raises:
            Fault: it is somebody else.
        """
        if not self._is_admin(_bearer(headers)):
            raise _unknown_key("this needs the administrator's key, as 'Authorization: Bearer KEY'.")

    @contextmanager
    def taken(self, caller: Caller, requests: int, tokens: int) -> Iterator[None]:
        """Counts requests against a caller's limits, and keeps their tokens of its quota while they run.

        Args:
            caller: who asks.
            requests: how many sequences of prompts begin.
            tokens: the most that they can use.

        Raises:
            Fault: it is too much.
        """
        if caller.account is None:
            yield
            return
        self._take(caller.account, requests, tokens)
        try:
            yield
        finally:
            with self._lock:
                self._reserved[caller.account.name] -= tokens

    def ended(self, handle: RequestHandle) -> None:
        """Counts what a request has used."""
        if self._usage is not None:
            self._usage.add(handle)

    def _take(self, account: Account, requests: int, tokens: int) -> None:
        self._check_quota(account, tokens)
        try:
            self._check_rate(account, requests)
        except Fault:
            with self._lock:
                self._reserved[account.name] -= tokens
            raise

    def _check_quota(self, account: Account, tokens: int) -> None:
        assert self.accounts is not None and self._usage is not None
        with self._lock:
            if account.tokens_per_day is not None:
                day = today()
                # In this order: what is written in between counts twice, never not at all.
                used = self._usage.unwritten(account.name, day)
                used += self.accounts.tokens_used(account.name, day)
                if used + self._reserved[account.name] + tokens > account.tokens_per_day:
                    message = (
                        f"of {account.tokens_per_day} tokens a day {used} are used and {self._reserved[account.name]} "
                        f"asked for, and this request could take {tokens}; ask for fewer, or come back tomorrow (UTC)."
                    )
                    raise _too_much(message, "insufficient_quota", _DAY - time.time() % _DAY)
            self._reserved[account.name] += tokens

    def _check_rate(self, account: Account, requests: int) -> None:
        if account.requests_per_minute is None:
            return
        item = RateLimitItemPerMinute(account.requests_per_minute)
        if requests > account.requests_per_minute or not self._requests.hit(item, account.name, cost=requests):
            seconds = self._requests.get_window_stats(item, account.name).reset_time - time.time()
            message = f"{account.requests_per_minute} requests a minute are allowed; slow down."
            raise _too_much(message, "rate_limit_exceeded", seconds)

    def _is_admin(self, key: str) -> bool:
        # Of hashes, so that lengths do not show.
        given, right = (
            hmac.digest(self._salt, (one or "").encode(errors="surrogatepass"), "sha256")
            for one in (key, self._admin_key)
        )
        return hmac.compare_digest(given, right) and bool(self._admin_key)


def _bearer(headers: Mapping[str, str]) -> str:
    kind, _, key = headers.get("authorization", "").partition(" ")
    return key.strip() if kind.lower() == "bearer" else ""


def _unknown_key(message: str) -> Fault:
    return Fault(401, message, code="invalid_api_key", headers={"WWW-Authenticate": 'Bearer realm="lorakit"'})


def _too_much(message: str, code: str, seconds: float) -> Fault:
    retry = {"Retry-After": str(max(1, round(seconds)))}
    return Fault(429, message, type="rate_limit_error", code=code, headers=retry)
