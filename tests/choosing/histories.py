"""What is read of a recorder's history, made by hand."""

from typing import NamedTuple

import numpy as np


class Recorded(NamedTuple):
    names: tuple[str, ...]
    sizes: np.ndarray
    size: np.ndarray
    measure: str | None = "l2"
    parts: str = "leaves"
