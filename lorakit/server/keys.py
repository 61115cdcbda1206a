"""API keys: made here, shown once, kept as hashes.

A key is `lk-ID-SECRET`. The id finds it and is no secret; of the secret, 256 random bits, only the SHA-256 is kept: of
so many bits a slow hash would protect nothing more.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from typing import NamedTuple

_NOBODYS = hashlib.sha256(secrets.token_bytes(32)).digest()


class Key(NamedTuple):
    """A key that was made.

    Attributes:
        text: what its owner is given; it is not kept.
        id: finds it.
        digest: of its secret.
    """

    text: str
    id: str
    digest: bytes


def new_key() -> Key:
    """Makes a key."""
    id, secret = secrets.token_hex(6), secrets.token_urlsafe(32)
    return Key(f"lk-{id}-{secret}", id, digest_of(secret))


def split(text: str) -> tuple[str, str]:
    """The id and the secret of a key; of what is none, something that no key has."""
    kind, _, rest = text.partition("-")
    id, _, secret = rest.partition("-")
    return (id, secret) if kind == "lk" else ("", text)


def digest_of(secret: str) -> bytes:
    """What is kept of a secret."""
    return hashlib.sha256(secret.encode(errors="surrogatepass")).digest()


def is_right(secret: str, digest: bytes | None) -> bool:
    """Whether a secret has a digest; None has none, and takes as long."""
    return hmac.compare_digest(digest_of(secret), _NOBODYS if digest is None else digest) and digest is not None
