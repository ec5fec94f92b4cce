"""How big may a group be: the limit, given or learned.

| threshold | limit |
|---|---|
| `constant(limit)` | a number |
| `scheduled(schedule)` | schedule(step), as in Optax |
| `unlimited()` | none: measure only |
| `per_path(limits)` | a number or schedule for each named group |
| `tightest(a, b, …)` | the smallest of several |
| `relative_to_params(ratio)` | a share of the size of the parameters |
| `robust()` | median and spread of the last sizes |
| `percentile(percentile, window)` | a percentile of the last sizes |
| `zscore(z_threshold)` | deviations above a running mean |
| `ema_multiple(multiple)` | a multiple of a running average |
| `online_quantile(quantile)` | an online estimate of a quantile |
| `growth(gamma)` | a ratio to the last size |
| `second_moment(theta)` | a multiple of the root of a running mean square |

`Threshold` makes one of your own; it sees a `Seen`.
"""

from optclip.clipping.thresholds import (
    Seen,
    Threshold,
    constant,
    ema_multiple,
    growth,
    online_quantile,
    per_path,
    percentile,
    relative_to_params,
    robust,
    scheduled,
    second_moment,
    tightest,
    unlimited,
    zscore,
)

__all__ = [
    "Seen",
    "Threshold",
    "constant",
    "ema_multiple",
    "growth",
    "online_quantile",
    "per_path",
    "percentile",
    "relative_to_params",
    "robust",
    "scheduled",
    "second_moment",
    "tightest",
    "unlimited",
    "zscore",
]
