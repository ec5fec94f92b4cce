"""What a recorder kept, made by hand."""

import numpy as np

from optclip import History
from optclip.clipping.recorder import Parts


def recorded(
    names: tuple[str, ...],
    sizes: np.ndarray,
    size: np.ndarray,
    measure: str = "l2",
    parts: Parts = "leaves",
) -> History:
    """Steps of these sizes, of which none was limited."""
    steps, no = np.arange(1, len(size) + 1), np.zeros(len(size), bool)
    limit = np.full(len(size), np.inf)
    bad = ~np.isfinite(sizes)
    return History(
        names, steps, sizes, size, limit, no, bad, parts=parts, measure=measure
    )
