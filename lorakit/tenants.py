"""The command `lorakit tenants`: who may use a server, how much, and what they have used."""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lorakit.console import make_console, table
from lorakit.errors import ConfigError

if TYPE_CHECKING:
    from lorakit.server.accounts import Account, Accounts

app = typer.Typer(help="The tenants of a server: keys, limits, adapters, usage.", no_args_is_help=True)

_UNLIMITED = 0

File = Annotated[
    Path,
    typer.Option("--file", "-f", envvar="LORAKIT_TENANTS", help="The file of tenants, as lorakit serve --tenants."),
]
Name = Annotated[str, typer.Argument(help="The tenant.", show_default=False)]
Adapters = Annotated[list[str], typer.Argument(help="Adapters, by name.", show_default=False)]
Weight = Annotated[
    float | None, typer.Option(help="Its share of the tokens while others wait too, beside theirs.", show_default=False)
]
MaxRunning = Annotated[int | None, typer.Option(min=0, help="Sequences that run at once; 0: any.", show_default=False)]
MaxWaiting = Annotated[int | None, typer.Option(min=0, help="Sequences that wait; 0: any.", show_default=False)]
PerMinute = Annotated[int | None, typer.Option(min=0, help="Requests in any minute; 0: any.", show_default=False)]
PerDay = Annotated[int | None, typer.Option(min=0, help="Tokens of a day (UTC); 0: any.", show_default=False)]

_DEFAULT = Path("tenants.db")


@app.command()
def add(
    name: Name,
    adapters: Annotated[list[str] | None, typer.Argument(help="Adapters that it may use.", show_default=False)] = None,
    weight: Weight = None,
    max_running: MaxRunning = None,
    max_waiting: MaxWaiting = None,
    requests_per_minute: PerMinute = None,
    tokens_per_day: PerDay = None,
    file: File = _DEFAULT,
) -> None:
    """Add a tenant, and make its first key, which is shown this once."""
    from lorakit.server.accounts import Account

    accounts = _open(file, create=True)
    limits = weight, max_running, max_waiting, requests_per_minute, tokens_per_day
    accounts.add(_with(Account(name), *limits))
    accounts.grant(name, adapters or ())
    typer.echo(accounts.new_key(name).text)


@app.command(name="set")
def change(
    name: Name,
    weight: Weight = None,
    max_running: MaxRunning = None,
    max_waiting: MaxWaiting = None,
    requests_per_minute: PerMinute = None,
    tokens_per_day: PerDay = None,
    file: File = _DEFAULT,
) -> None:
    """Change a tenant's limits; the server heeds them from its next request on."""
    accounts = _open(file)
    limits = weight, max_running, max_waiting, requests_per_minute, tokens_per_day
    if all(limit is None for limit in limits):
        raise ConfigError("nothing is to be set; name a limit, see lorakit tenants set --help.")
    accounts.change(_with(accounts.get(name), *limits))


@app.command()
def remove(name: Name, file: File = _DEFAULT) -> None:
    """Remove a tenant and its keys; what it has used stays in the file."""
    _open(file).remove(name)


@app.command()
def key(name: Name, file: File = _DEFAULT) -> None:
    """Make one more key, which is shown this once."""
    typer.echo(_open(file).new_key(name).text)


@app.command()
def revoke(
    id: Annotated[str, typer.Argument(help="The key, or its id.", show_default=False)], file: File = _DEFAULT
) -> None:
    """Make a key worthless."""
    _open(file).revoke_key(id)


@app.command()
def grant(name: Name, adapters: Adapters, file: File = _DEFAULT) -> None:
    """Let a tenant use adapters."""
    _open(file).grant(name, adapters)


@app.command()
def withdraw(name: Name, adapters: Adapters, file: File = _DEFAULT) -> None:
    """Take adapters from a tenant."""
    _open(file).withdraw(name, adapters)


@app.command()
def publish(adapters: Adapters, file: File = _DEFAULT) -> None:
    """Let every tenant use adapters."""
    _open(file).grant(None, adapters)


@app.command()
def unpublish(adapters: Adapters, file: File = _DEFAULT) -> None:
    """Take that back; who has a grant of its own keeps it."""
    _open(file).withdraw(None, adapters)


@app.command(name="list")
def show(file: File = _DEFAULT) -> None:
    """Show the tenants, their limits, keys and adapters."""
    accounts = _open(file)
    columns = ["tenant", "weight", "running", "waiting", "requests/min", "tokens/day", "keys", "adapters"]
    rows = [
        [
            one.name,
            f"{one.weight:g}",
            *(_limit(limit) for limit in one[2:]),
            " ".join(accounts.keys_of(one.name)),
            " ".join(sorted(accounts.adapters_of(one.name) - accounts.adapters_of(None))),
        ]
        for one in accounts.all()
    ]
    public = " ".join(sorted(accounts.adapters_of(None))) or "none"
    make_console().print(table(f"{file}; public adapters: {public}", columns, rows))


@app.command()
def usage(
    name: Annotated[str | None, typer.Argument(help="Of one tenant alone.", show_default=False)] = None,
    days: Annotated[int, typer.Option(min=1, help="Of so many days, today among them.")] = 30,
    as_json: Annotated[bool, typer.Option("--json", help="A line of JSON for each day, tenant and adapter.")] = False,
    file: File = _DEFAULT,
) -> None:
    """Show what tenants have used."""
    accounts = _open(file)
    today = datetime.datetime.now(datetime.UTC).date()
    used = accounts.usage(since=str(today - datetime.timedelta(days=days - 1)), tenant=name)
    if as_json:
        for one in used:
            typer.echo(json.dumps(one._asdict()))
        return
    columns = ["day", "tenant", "adapter", "requests", "prompt tokens", "generated tokens"]
    rows = [[one.day, one.tenant, one.adapter or "(the base)", *map(str, one[3:])] for one in used]
    make_console().print(table(f"{file}: the last {days} days", columns, rows))


def _open(file: Path, *, create: bool = False) -> Accounts:
    from lorakit.server.accounts import Accounts

    return Accounts(file, create=create)


def _with(
    account: Account,
    weight: float | None,
    max_running: int | None,
    max_waiting: int | None,
    requests_per_minute: int | None,
    tokens_per_day: int | None,
) -> Account:
    """The account with those limits that are given."""
    given = {
        "max_running": max_running,
        "max_waiting": max_waiting,
        "requests_per_minute": requests_per_minute,
        "tokens_per_day": tokens_per_day,
    }
    limits = {
        name: getattr(account, name) if value is None else value if value != _UNLIMITED else None
        for name, value in given.items()
    }
    return type(account)(account.name, account.weight if weight is None else weight, **limits)


def _limit(value: int | None) -> str:
    return "any" if value is None else str(value)
