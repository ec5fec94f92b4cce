"""How big may a group be: `optclip.thresholds`.

`base` says what a threshold is. `fixed` holds limits that are given, the others learn
theirs: `relative` from the parameters, `histories` from a window of past sizes,
`averages` and `deviations` from running averages of them.
"""

from optclip.clipping.thresholds.averages import ema_multiple as ema_multiple
from optclip.clipping.thresholds.averages import growth as growth
from optclip.clipping.thresholds.averages import online_quantile as online_quantile
from optclip.clipping.thresholds.averages import second_moment as second_moment
from optclip.clipping.thresholds.base import Seen as Seen
from optclip.clipping.thresholds.base import Threshold as Threshold
from optclip.clipping.thresholds.deviations import zscore as zscore
from optclip.clipping.thresholds.fixed import constant as constant
from optclip.clipping.thresholds.fixed import from_limit as from_limit
from optclip.clipping.thresholds.fixed import per_path as per_path
from optclip.clipping.thresholds.fixed import scheduled as scheduled
from optclip.clipping.thresholds.fixed import tightest as tightest
from optclip.clipping.thresholds.fixed import unlimited as unlimited
from optclip.clipping.thresholds.histories import percentile as percentile
from optclip.clipping.thresholds.histories import robust as robust
from optclip.clipping.thresholds.relative import (
    relative_to_params as relative_to_params,
)
