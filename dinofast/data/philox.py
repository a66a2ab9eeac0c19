"""The counter-based generator Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1,
2, 3", SC 2011)."""

from __future__ import annotations

import numpy as np


def philox(c0, c1, c2, c3, key: int) -> np.ndarray:
    """Random words of counters (c0, c1, c2, c3), which broadcast, under a 64-bit key: uint32 of
    their shape + (4,)."""
    low, word = np.uint64(0xFFFFFFFF), np.uint64(32)
    c0, c1, c2, c3 = (np.asarray(c, np.uint64) for c in (c0, c1, c2, c3))
    k0, k1 = key & 0xFFFFFFFF, key >> 32
    for _ in range(10):
        p0, p1 = c0 * np.uint64(0xD2511F53), c2 * np.uint64(0xCD9E8D57)
        c0 = p1 >> word ^ c1 ^ np.uint64(k0)
        c1 = p1 & low
        c2 = p0 >> word ^ c3 ^ np.uint64(k1)
        c3 = p0 & low
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return np.stack(np.broadcast_arrays(c0, c1, c2, c3), -1).astype(np.uint32)
