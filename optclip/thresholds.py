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

`Threshold` makes one of your own; it sees an `Observation` of every block.
"""

from optclip.clipping.rules.adagc import ema_multiple
from optclip.clipping.rules.agc import relative_to_params
from optclip.clipping.rules.autoclip import percentile
from optclip.clipping.rules.norm_growth_clip import growth
from optclip.clipping.rules.quantile_clip import online_quantile
from optclip.clipping.rules.second_moment_clip import second_moment
from optclip.clipping.rules.spike_clip import robust
from optclip.clipping.rules.zclip import zscore
from optclip.clipping.thresholds import (
    Observation,
    Threshold,
    constant,
    per_path,
    scheduled,
    tightest,
    unlimited,
)

__all__ = [
    "Observation",
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
