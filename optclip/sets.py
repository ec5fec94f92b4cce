"""Sets that parameters are kept in, for `project` and `project_params`.

| set | its points |
|---|---|
| `box(lower, upper)` | elements between two bounds |
| `nonnegative()` | elements that are not negative |
| `linf_ball(radius)` | elements of bounded magnitude |
| `init_box(kappa)` | elements up to kappa times the largest one at init |
| `l2_ball(radius)` | leaves, or units, of bounded Euclidean norm |
| `max_norm(max_value, axis)` | units of bounded norm: Keras' MaxNorm |
| `norm_sphere(radius)` | leaves, or units, of one norm |
| `init_sphere(grouping)` | leaves, matrices or units that keep their first norm |
| `unit_norm(axis)` | units of norm 1: Keras' UnitNorm |
| `norm_range(min_value, max_value, rate, axis)` | units with a norm in a range |
| `l1_ball(radius)` | leaves, or units, of bounded sum of magnitudes |
| `simplex(total)` | leaves, or units, that are not negative and have one sum |
| `spectral_ball(radius)` | matrices with bounded singular values |
| `orthogonal()` | matrices with orthonormal columns or rows |
| `intersection(a, b)` | points of two sets |

`Set` builds one of your own: its docstring has an example.
"""

from optclip.projections.base import Set
from optclip.projections.boxes import box, init_box, linf_ball, nonnegative
from optclip.projections.init_sphere import init_sphere
from optclip.projections.intersection import intersection
from optclip.projections.matrices import orthogonal, spectral_ball
from optclip.projections.norm_range import norm_range
from optclip.projections.norms import l2_ball, max_norm, norm_sphere, unit_norm
from optclip.projections.sorted_sets import l1_ball, simplex

__all__ = [
    "Set",
    "box",
    "init_box",
    "init_sphere",
    "intersection",
    "l1_ball",
    "l2_ball",
    "linf_ball",
    "max_norm",
    "nonnegative",
    "norm_range",
    "norm_sphere",
    "orthogonal",
    "simplex",
    "spectral_ball",
    "unit_norm",
]
