"""optclip: bounds on magnitudes for JAX, as Optax gradient transformations."""

# The parts that rules are made of.
from optclip._paths import mask as mask
from optclip.clipping import actions as actions
from optclip.clipping import groupings as groupings
from optclip.clipping import measures as measures
from optclip.clipping import thresholds as thresholds
from optclip.clipping.engine import ClipState as ClipState
from optclip.clipping.engine import clip_by as clip_by

# Numbers and state.
from optclip.clipping.metrics import ClipMetrics as ClipMetrics
from optclip.clipping.metrics import metrics as metrics
from optclip.clipping.norms import global_norm as global_norm
from optclip.clipping.norms import leaf_norms as leaf_norms

# Per-example clipping for private training.
from optclip.clipping.per_example import (
    per_example_global_norm_clip as per_example_global_norm_clip,
)
from optclip.clipping.per_example import (
    per_example_layer_norm_clip as per_example_layer_norm_clip,
)
from optclip.clipping.resuming import Adopted as Adopted
from optclip.clipping.resuming import adopt_state as adopt_state

# Rules with a fixed or scheduled limit.
from optclip.clipping.rules import clip_by_block_rms as clip_by_block_rms
from optclip.clipping.rules import clip_by_global_norm as clip_by_global_norm
from optclip.clipping.rules import clip_by_norm as clip_by_norm
from optclip.clipping.rules import monitor as monitor
from optclip.clipping.values import clip as clip
from optclip.clipping.values import clip_by_value as clip_by_value
