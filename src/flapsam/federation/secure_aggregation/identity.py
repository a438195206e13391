"""A site's identity: a key that it makes itself, so that nobody else can sign in its name."""

import hashlib
from pathlib import Path

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from flapsam.base.errors import FlapsamError
from flapsam.base.files import write_text


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
            self._key = Ed25519PrivateKey.generate()
            self.keep(path)
        try:
            self._key = Ed25519PrivateKey.from_private_bytes(bytes.fromhex(path.read_text().strip()))
        except (ValueError, OSError) as error:
            raise FlapsamError(
                f"{path}: cannot read this site's key; restore it, or remove it and give the other sites the new key"
            ) from error

    @classmethod
    def simulated(cls, seed: int, site: str) -> "Identity":
        """The key of a site in a simulation. It follows from the run's seed, because there is nobody to hide it from."""
        self = cls.__new__(cls)
        self._key = Ed25519PrivateKey.from_private_bytes(hashlib.sha256(f"{seed} {site}".encode()).digest())
        return self

    def keep(self, path: Path) -> None:
        """Write the private key to a file, from which it can be read."""
        write_text(path, self._key.private_bytes_raw().hex() + "\n")

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
