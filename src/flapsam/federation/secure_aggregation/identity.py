"""A site's identity: a key that it makes itself, so that nobody else can sign in its name."""

import os
from pathlib import Path

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from flapsam.base.errors import FlapsamError
from flapsam.base.files import make_folder, written_whole


class Identity:
    """An Ed25519 key in a file that only its owner can read. It is made when it is first needed."""

    def __init__(self, path: Path) -> None:
        """Read the key, or make one.

        Args:
            path: the key's file.

        Raises:
            FlapsamError: the file is damaged or cannot be written.
        """
        if not path.exists():
            make_folder(path.parent)
            with written_whole(path) as temporary, open(os.open(temporary, os.O_WRONLY | os.O_CREAT, 0o600), "w") as file:  # noqa: PTH123
                file.write(Ed25519PrivateKey.generate().private_bytes_raw().hex() + "\n")
        try:
            self._key = Ed25519PrivateKey.from_private_bytes(bytes.fromhex(path.read_text().strip()))
        except (ValueError, OSError) as error:
            raise FlapsamError(
                f"{path}: cannot read this site's key; restore it, or remove it and give the other sites the new key"
            ) from error

    @property
    def public(self) -> str:
        """The public key, 64 hexadecimal digits."""
        return self._key.public_key().public_bytes_raw().hex()

    def sign(self, content: bytes) -> str:
        """The signature of some bytes, 128 hexadecimal digits."""
        return self._key.sign(content).hex()


def is_signed(content: bytes, signature: str, public: str) -> bool:
    """Whether a signature of some bytes was made with the private key of a public one."""
    try:
        Ed25519PublicKey.from_public_bytes(bytes.fromhex(public)).verify(bytes.fromhex(signature), content)
    except (InvalidSignature, ValueError):
        return False
    return True
