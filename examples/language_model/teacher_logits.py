"""The teacher's likeliest tokens at every position of the training text, cached on disk."""

from typing import NamedTuple

import numpy as np


class Cache(NamedTuple):
    """What a teacher thinks of each training sequence; both arrays are memory-mapped."""

    log_probs: np.ndarray  # float16 [sequences, length, k]
    indices: np.ndarray  # uint16 or uint32 [sequences, length, k]
