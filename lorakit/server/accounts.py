"""Tenants of a server in a SQLite file: their keys, limits, adapters, and what they have used.

The file may be changed while a server reads it, by `lorakit tenants` or another server: what changes acts on the next
request. Knows names and numbers; no HTTP and no engine.
"""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from lorakit.adapters import names
from lorakit.engine.checks import shown, whole
from lorakit.engine.tenants import TenantPolicy
from lorakit.errors import AccountError
from lorakit.server import keys

_VERSION = 1
_EVERYONE = "*"
_SCHEMA = """
CREATE TABLE tenants (
    name TEXT PRIMARY KEY,
    weight REAL NOT NULL,
    max_running INTEGER,
    max_waiting INTEGER,
    requests_per_minute INTEGER,
    tokens_per_day INTEGER,
    created INTEGER NOT NULL
) STRICT;
CREATE TABLE keys (
    id TEXT PRIMARY KEY,
    digest BLOB NOT NULL,
    tenant TEXT NOT NULL REFERENCES tenants ON DELETE CASCADE,
    created INTEGER NOT NULL
) STRICT;
CREATE TABLE grants (adapter TEXT NOT NULL, tenant TEXT NOT NULL, PRIMARY KEY (adapter, tenant)) STRICT;
CREATE TABLE usage (
    day TEXT NOT NULL,
    tenant TEXT NOT NULL,
    adapter TEXT NOT NULL,
    requests INTEGER NOT NULL,
    prompt_tokens INTEGER NOT NULL,
    generated_tokens INTEGER NOT NULL,
    PRIMARY KEY (tenant, day, adapter)
) STRICT;
"""


class Account(NamedTuple):
    """A tenant.

    Attributes:
        name: its name.
        weight: its share of the engine's tokens while others wait too, beside theirs.
        max_running: how many of its sequences may run at once, or None for any number.
        max_waiting: how many of its sequences may wait, or None for any number.
        requests_per_minute: how many it may begin in any minute, or None for any number.
        tokens_per_day: prompts' and generated, of a day in UTC, or None for any number.
    """

    name: str
    weight: float = 1.0
    max_running: int | None = None
    max_waiting: int | None = None
    requests_per_minute: int | None = None
    tokens_per_day: int | None = None

    @property
    def policy(self) -> TenantPolicy:
        """Its part that is the engine's."""
        return TenantPolicy(self.weight, self.max_running, self.max_waiting)


class Used(NamedTuple):
    """What a tenant has used with one adapter in a day.

    Attributes:
        day: in UTC, as 2026-11-23.
        tenant: its name.
        adapter: the adapter's; "" is the base.
        requests: that have ended.
        prompt_tokens: of them.
        generated_tokens: of them.
    """

    day: str
    tenant: str
    adapter: str
    requests: int
    prompt_tokens: int
    generated_tokens: int

    @property
    def tokens(self) -> int:
        """Both kinds."""
        return self.prompt_tokens + self.generated_tokens


def today() -> str:
    """The day in UTC."""
    return time.strftime("%Y-%m-%d", time.gmtime())


class Accounts:
    """The file. Callable from any thread."""

    def __init__(self, path: Path, *, create: bool = False) -> None:
        """Opens a file.

        Args:
            path: the file.
            create: make it if it is not there.

        Raises:
            AccountError: it is not there, or no file of accounts.
        """
        if not create and not path.is_file():
            raise AccountError(f"there is no file of tenants at {path}; `lorakit tenants add` makes one.")
        self.path = path
        self._lock = threading.RLock()
        with self._told():
            path.touch(mode=0o600)  # who uses what is nobody else's business
            self._db = sqlite3.connect(path, timeout=10, isolation_level=None, check_same_thread=False)
            self._db.executescript("PRAGMA journal_mode=WAL; PRAGMA synchronous=NORMAL; PRAGMA foreign_keys=ON;")
            with self._changing() as db:
                (version,) = db.execute("PRAGMA user_version").fetchone()
                if not version and not db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
                    for statement in _SCHEMA.split(";"):
                        db.execute(statement)
                    db.execute(f"PRAGMA user_version={_VERSION}")
                    version = _VERSION
        if version != _VERSION:
            self.close()
            raise AccountError(f"{path} is no file of tenants that this version of lorakit reads; name another.")

    def close(self) -> None:
        """Closes the file."""
        with self._lock:
            self._db.close()

    # Tenants

    def add(self, account: Account) -> None:
        """Adds a tenant.

        Raises:
            AccountError: there is one of that name, or a limit cannot be.
        """
        account = _checked(account)
        with self._changing() as db:
            if self._find(account.name) is not None:
                raise AccountError(f"there is a tenant {account.name!r} already; `lorakit tenants set` changes it.")
            db.execute("INSERT INTO tenants VALUES (?, ?, ?, ?, ?, ?, ?)", (*account, int(time.time())))

    def change(self, account: Account) -> None:
        """Gives a tenant other limits.

        Raises:
            AccountError: there is none of that name, or a limit cannot be.
        """
        name, *limits = _checked(account)
        with self._changing() as db:
            self.get(account.name)
            db.execute(
                "UPDATE tenants SET weight=?, max_running=?, max_waiting=?, requests_per_minute=?, tokens_per_day=? "
                "WHERE name=?",
                (*limits, name),
            )

    def remove(self, name: str) -> None:
        """Takes a tenant out, with its keys and grants; what it has used stays.

        Raises:
            AccountError: there is none of that name.
        """
        with self._changing() as db:
            self.get(name)
            db.execute("DELETE FROM tenants WHERE name=?", (name,))
            db.execute("DELETE FROM grants WHERE tenant=?", (name,))

    def get(self, name: str) -> Account:
        """A tenant.

        Raises:
            AccountError: there is none of that name.
        """
        found = self._find(name)
        if found is None:
            raise AccountError(f"there is no tenant {name!r} in {self.path}; `lorakit tenants add` adds one.")
        return found

    def all(self) -> list[Account]:
        """The tenants, by name."""
        return [Account(*row[:6]) for row in self._rows("SELECT * FROM tenants ORDER BY name")]

    # Keys

    def new_key(self, tenant: str) -> keys.Key:
        """Makes a key of a tenant's.

        Raises:
            AccountError: there is no such tenant.
        """
        key = keys.new_key()
        with self._changing() as db:
            self.get(tenant)
            db.execute("INSERT INTO keys VALUES (?, ?, ?, ?)", (key.id, key.digest, tenant, int(time.time())))
        return key

    def revoke_key(self, id: str) -> None:
        """Makes a key worthless.

        Args:
            id: its id; the key itself does as well.

        Raises:
            AccountError: there is none.
        """
        id = keys.split(id)[0] or id
        with self._changing() as db:
            if not db.execute("DELETE FROM keys WHERE id=?", (id,)).rowcount:
                raise AccountError(f"there is no key of id {id!r}; `lorakit tenants` lists them.")

    def keys_of(self, tenant: str) -> list[str]:
        """The ids of a tenant's keys, oldest first."""
        return [id for (id,) in self._rows("SELECT id FROM keys WHERE tenant=? ORDER BY created, rowid", tenant)]

    def owner_of(self, key: str) -> Account | None:
        """Whose key it is; of a wrong one nobody's, in the same time."""
        id, secret = keys.split(key)
        rows = self._rows(
            "SELECT keys.digest, tenants.* FROM keys JOIN tenants ON tenants.name = keys.tenant WHERE id=?", id
        )
        digest, *row = rows[0] if rows else (None,)
        return Account(*row[:6]) if keys.is_right(secret, digest) else None

    # Adapters

    def grant(self, tenant: str | None, adapters: Iterable[str]) -> None:
        """Lets a tenant, or everyone (None), use adapters, whether they are there already or not.

        Raises:
            AccountError: there is no such tenant.
            InvalidAdapterNameError: a name can be no adapter's.
        """
        adapters = list(adapters)
        for name in adapters:
            names.check_name(name)
        with self._changing() as db:
            who = self._who(tenant)
            db.executemany("INSERT OR IGNORE INTO grants VALUES (?, ?)", [(name, who) for name in adapters])

    def withdraw(self, tenant: str | None, adapters: Iterable[str]) -> None:
        """Takes that back.

        Raises:
            AccountError: there is no such tenant, or it may not use one of them.
        """
        with self._changing() as db:
            who = self._who(tenant)
            for name in adapters:
                if not db.execute("DELETE FROM grants WHERE adapter=? AND tenant=?", (name, who)).rowcount:
                    raise AccountError(f"{tenant or 'everyone'!r} has no grant of adapter {name!r}.")

    def may_use(self, tenant: str, adapter: str) -> bool:
        """Whether a tenant may use an adapter."""
        rows = self._rows("SELECT 1 FROM grants WHERE adapter=? AND tenant IN (?, ?)", adapter, tenant, _EVERYONE)
        return bool(rows)

    def adapters_of(self, tenant: str | None) -> set[str]:
        """The adapters that a tenant may use, everyone's among them; None: everyone's."""
        rows = self._rows("SELECT adapter FROM grants WHERE tenant IN (?, ?)", tenant or _EVERYONE, _EVERYONE)
        return {name for (name,) in rows}

    # Usage

    def record(self, used: Sequence[Used]) -> None:
        """Adds to what tenants have used."""
        with self._changing() as db:
            db.executemany(
                "INSERT INTO usage VALUES (?, ?, ?, ?, ?, ?) ON CONFLICT DO UPDATE SET "
                "requests = requests + excluded.requests, prompt_tokens = prompt_tokens + excluded.prompt_tokens, "
                "generated_tokens = generated_tokens + excluded.generated_tokens",
                used,
            )

    def tokens_used(self, tenant: str, day: str) -> int:
        """The tokens that a tenant has used in a day."""
        query = "SELECT total(prompt_tokens + generated_tokens) FROM usage WHERE tenant=? AND day=?"
        return int(self._rows(query, tenant, day)[0][0])

    def usage(self, *, since: str = "", tenant: str | None = None) -> list[Used]:
        """What was used, by day, tenant and adapter.

        Args:
            since: the first day.
            tenant: of one alone.
        """
        rows = self._rows(
            "SELECT day, tenant, adapter, requests, prompt_tokens, generated_tokens FROM usage "
            "WHERE day >= ? AND (? IS NULL OR tenant = ?) ORDER BY day, tenant, adapter",
            since,
            tenant,
            tenant,
        )
        return [Used(*row) for row in rows]

    def _find(self, name: str) -> Account | None:
        rows = self._rows("SELECT * FROM tenants WHERE name=?", name)
        return Account(*rows[0][:6]) if rows else None

    def _who(self, tenant: str | None) -> str:
        return _EVERYONE if tenant is None else self.get(tenant).name

    def _rows(self, query: str, *arguments: Any) -> list[tuple[Any, ...]]:
        with self._told(), self._lock:
            return self._db.execute(query, arguments).fetchall()

    @contextmanager
    def _changing(self) -> Iterator[sqlite3.Connection]:
        """A transaction."""
        with self._told(), self._lock:
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield self._db
            except BaseException:
                self._db.execute("ROLLBACK")
                raise
            self._db.execute("COMMIT")

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, OSError) as error:
            raise AccountError(f"the file of tenants at {self.path} cannot be used: {error}.") from error


def _checked(account: Account) -> Account:
    if not account.name or account.name == _EVERYONE or not account.name.isprintable() or len(account.name) > 128:
        raise AccountError(
            f"a tenant cannot be called {shown(account.name)}; give 1 to 128 printable characters, other than '*'."
        )
    policy = account.policy  # refuses what the engine would
    return Account(
        account.name,
        policy.weight,
        policy.max_running,
        policy.max_waiting,
        _limit("requests_per_minute", account.requests_per_minute),
        _limit("tokens_per_day", account.tokens_per_day),
    )


def _limit(name: str, value: int | None) -> int | None:
    return None if value is None else whole(AccountError, f"a tenant's {name} (None: no limit)", value, 1)
