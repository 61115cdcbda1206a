"""The names that adapters may have.

Knows text only. A name becomes a part of tensor names, of URLs and of command lines, so it is kept plain.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

from lorakit.errors import AdapterNameError, AdapterNotFoundError

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
# Exported checkpoints are often put into folders called like the adapter, and Windows cannot have these.
_RESERVED = re.compile(r"(con|prn|aux|nul|com[0-9]|lpt[0-9])(\..*)?", re.IGNORECASE)


def is_name(name: object) -> bool:
    """Whether an adapter may be called so."""
    return isinstance(name, str) and bool(_NAME.fullmatch(name)) and not _RESERVED.fullmatch(name)


def check_name(name: object) -> None:
    """Refuses what is no adapter name.

    Raises:
        AdapterNameError: with the rule.
    """
    if not is_name(name):
        shown = repr(name) if len(repr(name)) <= 80 else repr(name)[:77] + "..."
        raise AdapterNameError(
            f"{shown} cannot be an adapter's name. Choose 1 to 128 letters, digits, '.', '_' or '-', beginning with "
            "a letter or a digit, and no device name of Windows such as 'con' or 'nul'."
        )


def not_found(name: object, names: Iterable[str], where: str) -> AdapterNotFoundError:
    """The error for a name that is not there, with the nearest ones that are.

    Args:
        name: what was asked for.
        names: what there is.
        where: the place, as "bank 'tenants/'".
    """
    known = list(names)
    near = difflib.get_close_matches(name, known, n=3) if isinstance(name, str) else []
    if near:
        hint = f"Did you mean {' or '.join(map(repr, near))}?"
    elif not known:
        hint = "It holds no adapters yet: add one first."
    else:
        listed = ", ".join(known[:5]) + (", …" if len(known) > 5 else "")
        hint = f"It holds {listed}. Names are case-sensitive."
    return AdapterNotFoundError(f"no adapter {name!r} in {where}. {hint}")
