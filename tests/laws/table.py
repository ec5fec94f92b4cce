"""Every transform, with the ways to build it and its kind: the table that laws read.

A row's kind chooses its laws; an exception is a field of the row, with its reason
beside it. Adding a transform here adds it to every law of its kind.

`Row.build(limit, **options)` makes the transform, with options such as `nonfinite` for
rows of kind "clip"; `Row.oracle` are the keyword arguments of
`tests.oracles.fixed.clip` that describe it.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import optax

import optclip
from optclip import actions, groupings, measures, thresholds


class Row(NamedTuple):
    """One transform.

    Attributes:
      name: unique, the test's id.
      kind: "matrix" (singular values bounded: `tests/test_spectral_clip.py` instead of
        laws 1 to 3, 7, 9 and 11, for it factorises: it gathers split matrices and keeps
        copies), "clip" (groups scaled down to a limit), "enlarging" (up to it, or
        up and down: law 13 instead of laws 1 to 3), "adaptive" (to a limit that the
        rule sets itself, from a history as short as it takes for two steps to teach
        it),
        "elementwise" (flat clamps), "measuring" (never changes an update), or "wrapper"
        (around an optimizer, here one that does nothing).
      build: limit (number, array, schedule or tracer) to the transform; rows of kind
        "adaptive" have no use for it; they, "clip" and "enlarging" take options of
        `clip_by`.
      oracle: keyword arguments for `tests.oracles.fixed.clip`.
      public: the public name whose row this is, for the check that none is missing.
      argument: the name of its limit argument in messages; None if it takes thresholds.
      identity: whether a group within its limit keeps its bits, or the reason not.
      variant: whether another row of the same public name differs by its measure only
        (or its limit's spelling), so that laws about what holds a transform (wrappers,
        states) would see nothing new.
      batched: whether leaves need a common leading axis.
      integers: whether integer leaves pass untouched, or the reason not.
      needs_params: whether `update` must be given the parameters.
      differentiable_to: the largest entry at which derivatives are promised: |x|^p
        overflows float32 for p = 3 there, and with it the pass not chosen.
      has_metrics: whether its state holds `ClipMetrics`, or the reason not.
      complex: whether it takes complex leaves, or the reason not.
      ulps: how far jit may be from eager: a limit that is an exponential of a logarithm
        is rounded as XLA pleases.
      least_limit: positive limits below it may not give the oracle's outputs.
      fuses: whether an optimizer's kernels clip what they read, or the reason not.
      sums: how many times a joint rule's program holds the reductions of a global norm:
        once, and once more in the second pass. Three where summands are powers above
        squares, for which no two scales bring all of float32 into range, as they do
        for squares: the second pass needs the largest element before it can sum.
      dtypes: in which the laws of values run it, None for all: what a rule records
        changes no update, as a test of its own compares bit for bit.
    """

    name: str
    kind: str
    build: Callable[..., Any]
    oracle: dict[str, Any]
    public: str
    argument: str | None = None
    identity: bool | str = True
    variant: bool = False
    batched: bool = False
    integers: bool | str = True
    needs_params: bool = False
    has_metrics: bool | str = True
    differentiable_to: float = float("inf")
    complex: bool | str = True
    ulps: int = 2
    least_limit: float = 0.0
    fuses: bool | str = True
    dtypes: tuple[str, ...] | None = None
    sums: int = 2


def _threshold(limit: Any) -> thresholds.Threshold:
    if isinstance(limit, Callable):
        return thresholds.scheduled(limit)
    return thresholds.constant(limit)


def _negative(limit: Any) -> Any:
    return (lambda step: -limit(step)) if isinstance(limit, Callable) else -limit


def _parts(grouping: Any, measure: Any = measures.l2, action: Any = None) -> Callable:
    return lambda limit, **options: optclip.clip_by(
        _threshold(limit),
        measure=measure,
        grouping=grouping,
        action=actions.rescale() if action is None else action,
        **options,
    )


ORDER = "of complex numbers none is larger than another"
REAL = "an interval says nothing about complex numbers, so clip_by_value raises"
TWO_ARRAYS = "XLA writes once what it would have to make twice from two whole arrays"
PRIVACY = "a sum that privacy bounds may hold nothing that was not measured"
FLAT = "flat: it measures nothing, so it keeps no state"
SMOOTH = "smooth shrinks every group, by its definition"
EPS = "div_eps > 0 is PyTorch's convention, which shrinks a group at its limit"

SINGULAR = "each singular value has a factor of its own, and is known to rounding"
COUNTERS = "skip_step's own metrics are counters; the sizes are in its watch"


def _adaptive(public: str, grouping: str = "whole", **arguments: Any) -> Row:
    rule = getattr(optclip, public)
    return Row(
        public,
        "adaptive",
        lambda limit, **options: rule(**arguments, **options),
        {"grouping": grouping},
        public=public,
    )


ROWS = [
    Row(
        "clip_by_global_norm",
        "clip",
        lambda limit, **options: optclip.clip_by_global_norm(limit, **options),
        {"grouping": "whole"},
        public="clip_by_global_norm",
        argument="max_norm",
    ),
    Row(
        "clip_by_global_norm-l1",
        "clip",
        lambda limit, **options: optclip.clip_by_global_norm(
            limit, measure=measures.l1, **options
        ),
        {"grouping": "whole", "measure": "l1"},
        public="clip_by_global_norm",
        argument="max_norm",
        variant=True,
    ),
    Row(
        "clip_by_global_norm-lp3",
        "clip",
        lambda limit, **options: optclip.clip_by_global_norm(
            limit, measure=measures.lp(3), **options
        ),
        {"grouping": "whole", "measure": 3},
        public="clip_by_global_norm",
        argument="max_norm",
        differentiable_to=1e12,
        sums=3,
    ),
    Row(
        "clip_by_global_norm-lp1.5",
        "clip",
        lambda limit, **options: optclip.clip_by_global_norm(
            limit, measure=measures.lp(1.5), **options
        ),
        {"grouping": "whole", "measure": 1.5},
        public="clip_by_global_norm",
        argument="max_norm",
        variant=True,
    ),
    Row(
        "clip_by_global_norm-smooth",
        "clip",
        lambda limit, **options: optclip.clip_by_global_norm(
            limit, action=actions.smooth(), **options
        ),
        {"grouping": "whole", "action": "smooth"},
        public="clip_by_global_norm",
        argument="max_norm",
        identity=SMOOTH,
    ),
    Row(
        "clip_by_global_norm-div_eps",
        "clip",
        lambda limit, **options: optclip.clip_by_global_norm(
            limit, action=actions.rescale(1e-6), **options
        ),
        {"grouping": "whole", "action": "torch"},
        public="clip_by_global_norm",
        argument="max_norm",
        identity=EPS,
        # Below div_eps even a group of size 0 shrinks, and so one whose squares vanish,
        # which no rescaling from size 0 can express.
        least_limit=1e-6,
        variant=True,
    ),
    Row(
        "clip_by_global_norm-record",
        "clip",
        lambda limit, **options: optclip.clip_by_global_norm(
            limit, record=3, **options
        ),
        {"grouping": "whole"},
        public="clip_by_global_norm",
        argument="max_norm",
        dtypes=("float32",),
    ),
    Row(
        "clip_by_norm",
        "clip",
        lambda limit, **options: optclip.clip_by_norm(limit, **options),
        {"grouping": "leaf"},
        public="clip_by_norm",
        argument="max_norm",
    ),
    Row(
        "clip_by_norm-max_abs",
        "clip",
        lambda limit, **options: optclip.clip_by_norm(
            limit, measure=measures.max_abs, **options
        ),
        {"grouping": "leaf", "measure": "max_abs"},
        public="clip_by_norm",
        argument="max_norm",
        variant=True,
    ),
    Row(
        "clip_by_norm-per_unit",
        "clip",
        lambda limit, **options: optclip.clip_by_norm(
            limit, grouping=groupings.per_unit(), **options
        ),
        {"grouping": "unit"},
        public="clip_by_norm",
        argument="max_norm",
    ),
    Row(
        "clip_by_norm-per_unit-record",
        "clip",
        lambda limit, **options: optclip.clip_by_norm(
            limit, grouping=groupings.per_unit(), record=3, **options
        ),
        {"grouping": "unit"},
        public="clip_by_norm",
        argument="max_norm",
        dtypes=("float32",),
    ),
    Row(
        "clip_by_block_rms",
        "clip",
        lambda limit, **options: optclip.clip_by_block_rms(limit, **options),
        {"grouping": "leaf", "measure": "rms"},
        public="clip_by_block_rms",
        argument="threshold",
    ),
    Row(
        "clip_by-per_label",
        "clip",
        _parts(groupings.per_label(lambda path: path[:1])),
        {"grouping": "label"},
        public="clip_by",
    ),
    Row(
        "clip_by-per_example",
        "clip",
        _parts(groupings.per_example()),
        {"grouping": "example"},
        public="clip_by",
        batched=True,
        integers=PRIVACY,
    ),
    Row(
        "clip_by-per_element",
        "clip",
        _parts(groupings.per_element()),
        {"grouping": "element"},
        public="clip_by",
    ),
    Row(
        "clip_by-per_matrix",
        "clip",
        _parts(groupings.per_matrix(stacked="^b/kernel")),
        {"grouping": "matrix"},
        public="clip_by",
    ),
    Row(
        "clip_by-measured",
        "clip",
        _parts(groupings.whole(measured="kernel|mlp")),
        {"grouping": "kernels"},
        public="clip_by",
    ),
    Row(
        "clip_by-normalize",
        "enlarging",
        _parts(groupings.per_leaf(), action=actions.normalize()),
        {"grouping": "leaf", "action": "normalize"},
        public="clip_by",
        identity="every group is scaled to its limit",
    ),
    Row(
        "clip_by-floor",
        "enlarging",
        _parts(groupings.per_unit(), action=actions.floor()),
        {"grouping": "unit", "action": "floor"},
        public="clip_by",
        identity="a group within its limit is raised to it",
    ),
    Row(
        "clip_by-tightest",
        "clip",
        lambda limit, **options: optclip.clip_by(
            thresholds.tightest(
                thresholds.constant(float("inf")),
                _threshold(limit),
                thresholds.unlimited(),
            ),
            **options,
        ),
        {"grouping": "whole"},
        public="clip_by",
        variant=True,
    ),
    Row(
        "clip_by_value",
        "elementwise",
        lambda limit: optclip.clip_by_value(limit),
        {"grouping": "element"},
        public="clip_by_value",
        argument="max_delta",
        has_metrics=FLAT,
    ),
    Row(
        "clip_by_value-interval",
        "elementwise",
        lambda limit: optclip.clip_by_value(
            min_value=_negative(limit), max_value=limit
        ),
        {"grouping": "element"},
        public="clip_by_value",
        has_metrics=FLAT,
        complex=REAL,
    ),
    Row(
        "clip",
        "elementwise",
        lambda limit: optclip.clip(limit),
        {"grouping": "element"},
        public="clip",
        argument="max_delta",
        has_metrics=FLAT,
    ),
    Row(
        "spectral_clip",
        "matrix",
        lambda limit, **options: optclip.spectral_clip(limit, **options),
        {"grouping": "leaf"},
        public="spectral_clip",
        argument="max_sigma",
        identity=SINGULAR,
        complex=ORDER,
    ),
    Row(
        "spectral_clip-products",
        "matrix",
        lambda limit, **options: optclip.spectral_clip(limit, iterations=24, **options),
        {"grouping": "leaf"},
        public="spectral_clip",
        argument="max_sigma",
        identity=SINGULAR,
        variant=True,
        has_metrics="products find no singular value, so there are counters only",
        complex=ORDER,
    ),
    Row(
        "spectral_clip-soft",
        "matrix",
        lambda limit, **options: optclip.spectral_clip(limit, soft=True, **options),
        {"grouping": "leaf"},
        public="spectral_clip",
        argument="max_sigma",
        identity="each singular value shrinks, by its definition",
        variant=True,
        complex=ORDER,
    ),
    _adaptive("spike_clip", window=4)._replace(ulps=8),
    _adaptive("autoclip", percentile=40.0, window=3),
    _adaptive("zclip", z_threshold=0.5, warmup_steps=2),
    _adaptive("adagc", "leaf", warmup_steps=2),
    _adaptive("adagc", "leaf", warmup_steps=2, record=2)._replace(
        name="adagc-record", dtypes=("float32", "bfloat16")
    ),
    _adaptive("quantile_clip"),
    _adaptive("norm_growth_clip", "leaf"),
    _adaptive(
        "second_moment_clip", "element", theta=4.0, decay=0.5, warmup_steps=1
    )._replace(fuses=TWO_ARRAYS),
    _adaptive("adaptive_grad_clip", "unit", clipping=0.5)._replace(needs_params=True),
    Row(
        "skip_step",
        "wrapper",
        lambda limit: optclip.skip_step(optax.identity(), limit),
        {"grouping": "whole"},
        public="skip_step",
        argument="threshold",
        has_metrics=COUNTERS,
    ),
    Row(
        "monitor",
        "measuring",
        lambda limit: optclip.monitor(),
        {"grouping": "whole"},
        public="monitor",
    ),
    Row(
        "monitor-per_leaf",
        "measuring",
        lambda limit: optclip.monitor(measures.rms, groupings.per_leaf()),
        {"grouping": "leaf", "measure": "rms"},
        public="monitor",
        variant=True,
    ),
    Row(
        "monitor-record",
        "measuring",
        lambda limit: optclip.monitor(record=2),
        {"grouping": "whole"},
        public="monitor",
        dtypes=("float32",),
    ),
]


def rows(*kinds: str, variants: bool = True) -> list[Any]:
    """The rows of some kinds, as pytest parameters."""
    import pytest

    chosen = [
        row for row in ROWS if row.kind in kinds and (variants or not row.variant)
    ]
    return [pytest.param(row, id=row.name) for row in chosen]


class Constraint(NamedTuple):
    """One set, whose laws differ from those of clips: it sees parameters.

    Attributes:
      name: unique, the test's id.
      make: size (number, array or tracer) to the set.
      public: the public name whose row this is.
      argument: the name of its size in messages.
      points: what lies in the set or not: "element", "unit", "leaf" or "matrix".
      lands: "inside" (exactly), "ball" (never outside, near the nearest point),
        "near" (sums and norms within 4 ulp) or "iterative" (within `tolerance`).
      tolerance: how far outside an iterative set may land, relatively.
      complex: whether it takes complex leaves, or the reason not.
      fuses: whether it needs no copy of a leaf, or the reason not.
      mapped: whether it works inside `shard_map`, or the reason not.
      digits: whether each entry keeps its digits however XLA orders the sums, or the
        reason why only those beside a matrix's largest entry do.
      around: size to the transform that lands there, if it is not `project`.
      apart: whether it remembers an array a leaf, so that its state depends on them.
    """

    name: str
    make: Callable[[Any], optclip.sets.Set]
    public: str
    argument: str | None
    points: str
    lands: str
    tolerance: float = 0.0
    complex: bool | str = True
    fuses: bool | str = True
    mapped: bool | str = True
    digits: bool | str = True
    around: Callable[[Any], optax.GradientTransformationExtraArgs] | None = None
    apart: bool = False

    def transform(self, size: Any) -> optax.GradientTransformationExtraArgs:
        """What lands in the set."""
        if self.around is not None:
            return self.around(size)
        return optclip.project(self.make(size))


SORTS = "it sorts"
FACTORISES = "it factorises matrices"
MULTIPLIES = "products of matrices are rounded beside their largest entries"
WHOLE = "points in parts cannot be joined by a sum"
SUBTRACTS = "what is taken away is as large as an update's largest entry"
SIZES = "it writes updates in their new size before it measures where they lead"
sets = optclip.sets


def hyperball_of(**options: Any) -> Callable[[Any], Any]:
    """Around an optimizer that does nothing, on every leaf as one group."""
    return lambda rate: optclip.hyperball(
        optax.identity(),
        rate,
        grouping=groupings.per_leaf(),
        where=optclip.everything,
        **options,
    )


PROJECTIONS = [
    Constraint(
        "box",
        lambda size: sets.box(-size, size),
        "box",
        None,
        "element",
        "inside",
        complex=ORDER,
    ),
    Constraint(
        "nonnegative",
        lambda size: sets.nonnegative(),
        "nonnegative",
        None,
        "element",
        "inside",
        complex=ORDER,
    ),
    Constraint(
        "linf_ball",
        sets.linf_ball,
        "linf_ball",
        "radius",
        "element",
        "inside",
        complex=ORDER,
    ),
    Constraint(
        "init_box",
        sets.init_box,
        "init_box",
        "kappa",
        "element",
        "inside",
        complex=ORDER,
    ),
    Constraint("l2_ball", sets.l2_ball, "l2_ball", "radius", "leaf", "ball"),
    Constraint("max_norm", sets.max_norm, "max_norm", "max_value", "unit", "ball"),
    Constraint(
        "l1_ball",
        sets.l1_ball,
        "l1_ball",
        "radius",
        "leaf",
        "ball",
        complex=ORDER,
        fuses=SORTS,
        mapped=WHOLE,
    ),
    Constraint(
        "norm_sphere", sets.norm_sphere, "norm_sphere", "radius", "leaf", "near"
    ),
    Constraint(
        "init_sphere",
        lambda size: sets.init_sphere(),
        "init_sphere",
        None,
        "leaf",
        "near",
    ),
    Constraint(
        "init_sphere-per_unit",
        lambda size: sets.init_sphere(groupings.per_unit()),
        "init_sphere",
        None,
        "unit",
        "near",
        apart=True,
    ),
    Constraint(
        "hyperball",
        lambda size: sets.init_sphere(),
        "hyperball",
        "rate",
        "leaf",
        "near",
        fuses=SIZES,
        around=hyperball_of(),
    ),
    Constraint(
        "hyperball-tangent",
        lambda size: sets.init_sphere(),
        "hyperball",
        "rate",
        "leaf",
        "near",
        fuses=SIZES,
        digits=SUBTRACTS,
        around=hyperball_of(tangent=True),
    ),
    Constraint(
        "unit_norm", lambda size: sets.unit_norm(), "unit_norm", None, "unit", "near"
    ),
    Constraint(
        "norm_range",
        lambda size: sets.norm_range(size / 2, size),
        "norm_range",
        None,
        "unit",
        "near",
    ),
    Constraint(
        "simplex",
        lambda size: sets.simplex(size, grouping=groupings.per_unit()),
        "simplex",
        None,
        "unit",
        "near",
        complex=ORDER,
        fuses=SORTS,
        mapped=WHOLE,
    ),
    Constraint(
        "spectral_ball",
        sets.spectral_ball,
        "spectral_ball",
        None,
        "matrix",
        "iterative",
        1e-6,
        complex=ORDER,
        fuses=FACTORISES,
        mapped=WHOLE,
    ),
    Constraint(
        "spectral_ball-products",
        lambda size: sets.spectral_ball(size, iterations=24),
        "spectral_ball",
        None,
        "matrix",
        "iterative",
        1e-4,
        complex=ORDER,
        fuses=FACTORISES,
        mapped=WHOLE,
        digits=MULTIPLIES,
    ),
    Constraint(
        "orthogonal",
        lambda size: sets.orthogonal(),
        "orthogonal",
        None,
        "matrix",
        "iterative",
        1e-6,
        complex=ORDER,
        fuses=FACTORISES,
        mapped=WHOLE,
    ),
    Constraint(
        "intersection",
        lambda size: sets.intersection(sets.l2_ball(size), sets.linf_ball(size / 2)),
        "intersection",
        None,
        "leaf",
        "iterative",
        1e-5,
        complex=ORDER,
        fuses="it remembers two more arrays",
    ),
]


def projections(**wanted: Any) -> list[Any]:
    """The sets whose fields are as wanted, as pytest parameters."""
    import pytest

    return [
        pytest.param(row, id=row.name)
        for row in PROJECTIONS
        if all(getattr(row, field) == value for field, value in wanted.items())
    ]


# One row of each kind of block, for `make quick`: the whole tree as one group, vectors
# of leaves and of examples, arrays of units and of elements, a flat rule without
# groups, a learned limit, a wrapper, a measurement; then sets of each kind.
QUICK_ROWS = (
    "clip_by_global_norm",
    "clip_by_norm",
    "clip_by-per_example",
    "clip_by_norm-per_unit",
    "clip_by-per_element",
    "clip_by_value",
    "spike_clip",
    "skip_step",
    "monitor",
    "box",
    "l2_ball",
    "max_norm",
    "simplex",
    "spectral_ball",
)
