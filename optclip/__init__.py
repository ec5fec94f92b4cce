"""Clip gradients, constrain weights and initialize models in JAX.

Everything is an ordinary Optax gradient transformation, a pure function or a JAX
initializer, so it goes into any optimizer chain and any training loop.

Rules with a given limit, a number or a schedule:

    clip_by_value                 every element, by magnitude or by an interval
    clip                          the same under Optax's name
    clip_by_norm                  the norm of each leaf
    clip_by_global_norm           the norm of the whole tree
    clip_by_block_rms             the root mean square of each leaf
    per_example_global_norm_clip  each example's gradient by its norm, then summed
    per_example_layer_norm_clip   the same, leaf by leaf
    spectral_clip                 the singular values of each matrix
    monitor                       measures and changes nothing
    clip_cotangent                a gradient on its way back through a scan

Rules that find their limit themselves:

    spike_clip                    median and spread of recent norms; the robust default
    adaptive_grad_clip            AGC: each unit relative to its own parameters
    autoclip                      AutoClip: a percentile of the last norms
    zclip                         ZClip: outliers from the running mean
    adagc                         AdaGC: a multiple of each leaf's running average
    quantile_clip                 an online estimate of a quantile
    norm_growth_clip              Fira: the growth from one step to the next
    second_moment_clip            SPAM: each element by its own second moment
    skip_step                     wraps an optimizer; drops a bad step as a whole

A rule of your own, from four kinds of parts:

    clip_by                       the rule, from one part of each kind
    measures                      how big a group is: l2, rms, l1, max_abs, lp(p)
    groupings                     which elements are measured and clipped together
    thresholds                    how big a group may be
    actions                       what happens to a group over its limit

Parameters that stay in a set:

    project                       ends a chain: parameters stay in a set after each step
    project_params                the nearest parameters in a set, at once
    clip_weights                  WGAN weight clipping
    hyperball                     wraps an optimizer; matrices keep their first norm
    qk_clip                       MuonClip: bounds attention logits
    record_max_logits             records the logits that qk_clip needs, in Flax
    sets                          the sets: box, max_norm, simplex, spectral_ball, ...

Initialization:

    initializers                  presets for Flax, and redraw for a finished model

Choosing a rule and its value, from sizes that a run logged:

    suggest                       which rule, and which limit, with its evidence
    replay                        what rules would have done, without retraining
    replay_table                  replays of several rules side by side
    sweep                         trains with many limits at once
    plot                          pictures of histories, replays, advice and logs
    at_bound                      the share of weights that sit at their bound

Numbers, selection and saved states:

    metrics                       what every clip in an optimizer state measured
    history                       what a rule with record=K measured, step by step
    explain                       the same in words
    global_norm                   the norm of a tree
    leaf_norms                    the norm of each leaf, by path
    mask                          a mask for optax.masked, from a pattern
    everything                    a `where` that selects every leaf
    adopt_state                   moves a saved optimizer state into a changed chain

Types, to annotate and to read:

    ClipState                     the state of every rule that measures
    RecordedClipState             the same with record=K
    RecorderState                 the steps in it
    History                       what history returns
    ClipMetrics                   size, limit and counters, in ClipState
    SkipState                     the state of skip_step
    SkipMetrics                   the counters in it
    ProjectState                  the state of project
    HyperballState                the state of hyperball
    Adopted                       what adopt_state returns
    Advice                        what suggest returns
    Replay                        what replay returns for each rule
    Sweep                         what sweep returns
"""

from optclip import (
    actions,
    groupings,
    initializers,
    measures,
    plot,
    sets,
    thresholds,
)
from optclip._core.metrics import ClipMetrics, SkipMetrics
from optclip._core.paths import everything, mask
from optclip.choosing.at_bound import at_bound
from optclip.choosing.replay import Replay, replay
from optclip.choosing.replay_table import replay_table
from optclip.choosing.suggest import Advice, suggest
from optclip.choosing.sweep import Sweep, sweep
from optclip.clipping.clip_by import clip_by
from optclip.clipping.clip_cotangent import clip_cotangent
from optclip.clipping.engine import ClipState, RecordedClipState
from optclip.clipping.recorder import RecorderState
from optclip.clipping.rules.adagc import adagc
from optclip.clipping.rules.agc import adaptive_grad_clip
from optclip.clipping.rules.autoclip import autoclip
from optclip.clipping.rules.norm_growth_clip import norm_growth_clip
from optclip.clipping.rules.norms import (
    clip_by_block_rms,
    clip_by_global_norm,
    clip_by_norm,
    monitor,
)
from optclip.clipping.rules.per_example import (
    per_example_global_norm_clip,
    per_example_layer_norm_clip,
)
from optclip.clipping.rules.quantile_clip import quantile_clip
from optclip.clipping.rules.second_moment_clip import second_moment_clip
from optclip.clipping.rules.skip_step import SkipState, skip_step
from optclip.clipping.rules.spike_clip import spike_clip
from optclip.clipping.rules.values import clip, clip_by_value
from optclip.clipping.rules.zclip import zclip
from optclip.hyperball import HyperballState, hyperball
from optclip.insight.adopt_state import Adopted, adopt_state
from optclip.insight.explain import explain
from optclip.insight.history import History, history
from optclip.insight.metrics import metrics
from optclip.insight.norms import global_norm, leaf_norms
from optclip.projections.clip_weights import clip_weights
from optclip.projections.project import ProjectState, project
from optclip.projections.project_params import project_params
from optclip.projections.qk_clip import qk_clip
from optclip.projections.record_max_logits import record_max_logits
from optclip.spectral_clip import spectral_clip

__version__ = "0.1.0"  # pyproject.toml reads it here

__all__ = [
    "Adopted",
    "Advice",
    "ClipMetrics",
    "ClipState",
    "History",
    "HyperballState",
    "ProjectState",
    "RecordedClipState",
    "RecorderState",
    "Replay",
    "SkipMetrics",
    "SkipState",
    "Sweep",
    "actions",
    "adagc",
    "adaptive_grad_clip",
    "adopt_state",
    "at_bound",
    "autoclip",
    "clip",
    "clip_by",
    "clip_by_block_rms",
    "clip_by_global_norm",
    "clip_by_norm",
    "clip_by_value",
    "clip_cotangent",
    "clip_weights",
    "everything",
    "explain",
    "global_norm",
    "groupings",
    "history",
    "hyperball",
    "initializers",
    "leaf_norms",
    "mask",
    "measures",
    "metrics",
    "monitor",
    "norm_growth_clip",
    "per_example_global_norm_clip",
    "per_example_layer_norm_clip",
    "plot",
    "project",
    "project_params",
    "qk_clip",
    "quantile_clip",
    "record_max_logits",
    "replay",
    "replay_table",
    "second_moment_clip",
    "sets",
    "skip_step",
    "spectral_clip",
    "spike_clip",
    "suggest",
    "sweep",
    "thresholds",
    "zclip",
]
