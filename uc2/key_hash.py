"""A counter-based random source: a draw is a function of (seed, key, stream), computed for many keys at once.

`numpy`'s generators take some 10 microseconds to start, too long for planning an epoch of millions of keys;
mixing the key with splitmix64 (Steele, Lea and Flood, 2014) takes nanoseconds and needs no state.
"""

from functools import lru_cache

import numpy as np

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _mix(values: np.ndarray) -> np.ndarray:
    """The splitmix64 finaliser: a bijection of uint64 in which every input bit reaches every output bit."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def hash_keys(seed: int, keys: np.ndarray, stream: int) -> np.ndarray:
    """(n,) uint64, independent between seeds, keys and streams. `keys` (n,) integers >= 0."""
    return _mix(_start(seed, stream) + (np.asarray(keys).astype(np.uint64) + np.uint64(1)) * _GOLDEN)


@lru_cache(maxsize=1024)
def _start(seed: int, stream: int) -> np.ndarray:
    """(1,) uint64 from which the keys of a seed and stream are counted."""
    start = _mix(np.array([seed], np.uint64) + _GOLDEN)
    return _mix(start + np.array([stream], np.uint64) * _GOLDEN)


def uniform(seed: int, keys: np.ndarray, stream: int) -> np.ndarray:
    """(n,) float64, uniform in [0, 1)."""
    return (hash_keys(seed, keys, stream) >> np.uint64(11)) * 2.0**-53
