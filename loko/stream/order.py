"""Who gets which row: a rank's slice of a batch, and permutations that depend on nothing but a key."""

import numpy as np
import numpy.typing as npt

from loko.stream.errors import StreamError

Int64Array = npt.NDArray[np.int64]


def slice_of(start: int, stop: int, rank: int, world_size: int) -> tuple[int, int]:
    """The part of the global rows [start, stop) that belongs to `rank`.

    Slices are contiguous, follow each other in rank order and differ in length by one row at most; the remainder goes
    to the low ranks. A rank beyond the last row gets an empty slice.

    Raises:
        StreamError: if world_size < 1, rank is outside [0, world_size) or stop < start.
    """
    if world_size < 1:
        raise StreamError(f"world_size is {world_size}; it must be at least 1")
    if not 0 <= rank < world_size:
        raise StreamError(f"rank is {rank}; with world_size {world_size} it must be 0 to {world_size - 1}")
    if stop < start:
        raise StreamError(f"rows [{start}, {stop}) are not a range: stop must not be below start")
    share, remainder = divmod(stop - start, world_size)
    low = start + rank * share + min(rank, remainder)
    return low, low + share + (rank < remainder)


def permutation(n: int, *key: int) -> Int64Array:
    """A permutation of range(n), the same for the same key on every machine.

    It sorts the raw output of a Philox counter generator: NumPy promises that raw bits never change between versions,
    which it does not for Generator.permutation, and a resumed run must meet the same order.
    """
    bits = np.random.Philox(np.random.SeedSequence(key)).random_raw(n)
    return np.argsort(bits, kind="stable")


def uniform(row_ids: Int64Array, *key: int) -> npt.NDArray[np.float64]:
    """One number in [0, 1) for each row, a hash of the row's identity and the key (SplitMix64).

    Being a function of the row alone, it is the same whatever the batch size, the rank or the cursor a run resumed
    from.
    """
    state = row_ids.astype(np.uint64)
    for word in key:
        state = _mix(state + np.uint64((word * 0x9E3779B97F4A7C15 + 0x632BE59BD9B4E019) % 2**64))
    return (_mix(state) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mix(state: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))
