"""optclip: bounds on magnitudes for JAX, as Optax gradient transformations.

Grouped by concept, like the README: rules with a given limit, rules that set their own,
the parts that rules are made of, per-example sums, projections, numbers and state,
first values.
"""

# Rules with a fixed or scheduled limit.
from optclip.clipping.rules.norms import clip_by_block_rms as clip_by_block_rms
from optclip.clipping.rules.norms import clip_by_global_norm as clip_by_global_norm
from optclip.clipping.rules.norms import clip_by_norm as clip_by_norm
from optclip.clipping.rules.norms import monitor as monitor
from optclip.clipping.rules.values import clip as clip
from optclip.clipping.rules.values import clip_by_value as clip_by_value

# Rules that set their own limit, and the guard around an optimizer.
from optclip.clipping.rules.adagc import adagc as adagc
from optclip.clipping.rules.agc import adaptive_grad_clip as adaptive_grad_clip
from optclip.clipping.rules.autoclip import autoclip as autoclip
from optclip.clipping.rules.norm_growth_clip import norm_growth_clip as norm_growth_clip
from optclip.clipping.rules.quantile_clip import quantile_clip as quantile_clip
from optclip.clipping.rules.second_moment_clip import (
    second_moment_clip as second_moment_clip,
)
from optclip.clipping.rules.spike_clip import spike_clip as spike_clip
from optclip.clipping.rules.zclip import zclip as zclip
from optclip.clipping.rules.skip_step import SkipState as SkipState
from optclip.clipping.rules.skip_step import skip_step as skip_step

# The parts that rules are made of.
from optclip import actions as actions
from optclip import groupings as groupings
from optclip import measures as measures
from optclip import thresholds as thresholds
from optclip.clipping.engine import ClipState as ClipState
from optclip.clipping.engine import clip_by as clip_by

# Sums of clipped per-example gradients.
from optclip.clipping.rules.per_example import (
    per_example_global_norm_clip as per_example_global_norm_clip,
)
from optclip.clipping.rules.per_example import (
    per_example_layer_norm_clip as per_example_layer_norm_clip,
)

# Parameters that stay where they must.
from optclip import sets as sets
from optclip.projections.project import ProjectState as ProjectState
from optclip.projections.clip_weights import clip_weights as clip_weights
from optclip.projections.project import project as project
from optclip.projections.project_params import project_params as project_params
from optclip.projections.qk_clip import qk_clip as qk_clip
from optclip.projections.qk_clip import record_max_logits as record_max_logits

# Numbers, state and selection.
from optclip._core.paths import everything as everything
from optclip._core.paths import mask as mask
from optclip._core.metrics import ClipMetrics as ClipMetrics
from optclip._core.metrics import SkipMetrics as SkipMetrics
from optclip.insight.metrics import metrics as metrics
from optclip.insight.norms import global_norm as global_norm
from optclip.insight.norms import leaf_norms as leaf_norms
from optclip.insight.adopt_state import Adopted as Adopted
from optclip.insight.adopt_state import adopt_state as adopt_state

# First values: presets and drawing a model anew.
from optclip import initializers as initializers
