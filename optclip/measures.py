"""How big: what the size of a group of elements is.

| measure | size |
|---|---|
| `l2` | √Σ\\|x\\|², the Euclidean norm (default) |
| `rms` | √(Σ\\|x\\|² / n), the root mean square |
| `l1` | Σ\\|x\\|, the sum of magnitudes |
| `max_abs` | max \\|x\\|, the largest magnitude |
| `lp(p)` | (Σ\\|x\\|^p)^(1/p), the p-norm |

A complex element counts by its modulus. `Measure` makes one of your own.
"""

from optclip._core.measures import Measure, l1, l2, lp, max_abs, rms

__all__ = ["Measure", "l1", "l2", "lp", "max_abs", "rms"]
