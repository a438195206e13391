"""Seeds for random choices, one for each purpose."""

import hashlib


def seed_for(run_seed: int, *purpose: str | int) -> int:
    """A 63-bit seed hashed from the run's seed and a purpose, such as ``(round, site, "augmentation")``.

    Because no generator is shared, results do not depend on the order of the work, the engine or restarts.
    """
    text = "/".join([str(run_seed), *(str(part) for part in purpose)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
