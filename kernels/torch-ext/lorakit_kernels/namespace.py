"""Under which name operators are registered: the package's own.

The Hub's loader imports each copy of this package under a name of its own, so copies can be loaded side by side, and
beside an installed one, without taking each other's operators away. That name is also what the Hub wants for them.
"""

from __future__ import annotations


def add_op_namespace_prefix(name: str) -> str:
    """An operator's full name. kernel-builder insists on a function of this name where operators are registered."""
    return f"{__package__}::{name}"
