"""The cryptography of secure aggregation, from ``cryptography`` and ``pycryptodome``: keys, masks, shares, envelopes."""

from collections.abc import Mapping

import numpy as np
from Crypto.Protocol.SecretSharing import Shamir
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

SECRET_BYTES = 32
"""Size of a private key, of a seed, and of a share of either."""
HALF = 16
"""Shamir's scheme of ``pycryptodome`` shares 16 bytes at a time."""
ONCE = bytes(12)
"""Nonce of an envelope. Its key seals this envelope only."""


def new_key() -> bytes:
    """A new private key for X25519."""
    return X25519PrivateKey.generate().private_bytes_raw()


def public(private: bytes) -> bytes:
    """The public key of a private one."""
    return X25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw()


def common(private: bytes, other: bytes, purpose: str) -> bytes:
    """The key that two sites have in common for a purpose: X25519, then HKDF with SHA-256.

    Args:
        private: one's own private key.
        other: the other's public key.
        purpose: what the key is for. Both must say the same.

    Raises:
        ValueError: the other's key is not safe, such as 0.
    """
    agreed = X25519PrivateKey.from_private_bytes(private).exchange(X25519PublicKey.from_public_bytes(other))
    return HKDF(SHA256(), SECRET_BYTES, salt=None, info=purpose.encode()).derive(agreed)


def mask(key: bytes, count: int, bits: int) -> np.ndarray:
    """``count`` uniformly distributed numbers of ``bits`` bits each, from a key by ChaCha20 (uint32)."""
    width = 1 if bits <= 8 else 2 if bits <= 16 else 4
    stream = Cipher(algorithms.ChaCha20(key, bytes(16)), mode=None).encryptor().update(bytes(count * width))
    return np.frombuffer(stream, f"<u{width}").astype(np.uint32) & np.uint32((1 << bits) - 1)


def seal(key: bytes, content: bytes) -> bytes:
    """Encrypt and authenticate with a key that is used once only."""
    return ChaCha20Poly1305(key).encrypt(ONCE, content, None)


def unseal(key: bytes, sealed: bytes) -> bytes:
    """Undo ``seal``.

    Raises:
        ValueError: it was not sealed with this key, or was changed.
    """
    try:
        return ChaCha20Poly1305(key).decrypt(ONCE, sealed, None)
    except InvalidTag as error:
        raise ValueError("it was not sealed with this key") from error


def shared_out(secret: bytes, count: int, threshold: int) -> list[bytes]:
    """Share a secret of 32 bytes out, so that any ``threshold`` of ``count`` shares restore it and fewer tell nothing.

    Shamir 1979. The share at position i belongs to index i + 1.
    """
    halves = [Shamir.split(threshold, count, secret[start : start + HALF]) for start in (0, HALF)]
    return [first + second for (_, first), (_, second) in zip(*halves, strict=True)]


def joined(shares: Mapping[int, bytes]) -> bytes:
    """Restore a secret.

    Args:
        shares: index from 1 → share, exactly as many as the threshold.
    """
    return b"".join(
        Shamir.combine([(index, share[start : start + HALF]) for index, share in shares.items()]) for start in (0, HALF)
    )
