"""Sources of randomness that a test can repeat."""

import numpy as np


class Seeded:
    """Random bytes from a seed, in the place of the operating system's."""

    def __init__(self, seed: int = 0) -> None:
        self.rng = np.random.default_rng(seed)

    def bytes(self, count: int) -> bytes:
        return self.rng.bytes(count)
