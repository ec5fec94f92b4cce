"""The signal at initialization: each layer's output, and the gradient that comes back.

    forward    y  = layer(x):  mean, standard deviation, share of dead units
    backward   ∂L/∂y:          mean, standard deviation, share of dead units

These are activations and their cotangents, not gradients of parameters. A network whose
standard deviation falls or grows by a factor from layer to layer will not train; a unit
whose every cotangent is zero, as behind a dead ReLU, cannot learn.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from optclip._core.public import error, public
from optclip._core.types import Tree
from optclip.initializers import layer_hooks, parameter_info
from optclip.initializers.layer_hooks import Recorder
from optclip.initializers.parameter_info import Model

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure


class Moments(NamedTuple):
    """Of all elements of one array.

    Attributes:
      mean: their mean.
      std: their standard deviation.
      dead: the share of units (the last axis) that are zero for every example.
    """

    mean: float
    std: float
    dead: float


class Signal(NamedTuple):
    """One layer's signal; `layer` is its path, with its number in a stack."""

    layer: str
    forward: Moments
    backward: Moments


class SignalReport(NamedTuple):
    """The signals of all layers, in the order in which they are called.

    `print(report)` is a table that ends in the verdict, `report.plot()` a picture.
    """

    rows: tuple[Signal, ...]

    @property
    def verdict(self) -> str:
        """What the numbers mean: a line for each fault, or that there is none.

        Vanishing or exploding: a standard deviation has a trend of 100-fold or more in
        all, or is not finite; for activations from the first layer to the last, for
        gradients back. The trend is the median over all pairs of layers (Theil and
        Sen's), so that single layers of another kind do not make one. Dead: over 90 %
        of a layer's units get no gradient from any example, as behind dead ReLUs, and
        also behind a head that starts at zero, which ends with the first step.

        >>> def layers(fold, dead=0.0):
        ...     both = [Moments(0, fold**n, dead) for n in range(9)]
        ...     return [Signal(f"fc{n}", both[0], both[n]) for n in range(9)]
        >>> print(SignalReport(tuple(layers(3.1))).verdict)
        gradient falls 3.1-fold a layer: vanishing; try he_normal or lsuv
        """
        return _verdict(self.rows)

    def __str__(self) -> str:
        width = max([len(row.layer) for row in self.rows] + [len("layer")])
        lines = [
            f"{'':{width}}{'forward':>32}{'backward':>32}",
            f"{'layer':{width}}" + f"{'mean':>12}{'std':>12}{'dead':>8}" * 2,
        ]
        for layer, *both in self.rows:
            numbers = [f"{m.mean:12.3g}{m.std:12.3g}{_share(m.dead):>8}" for m in both]
            lines.append(f"{layer:{width}}" + "".join(numbers))
        return "\n".join([*lines, self.verdict])

    def plot(self, axes: Sequence[Axes] | None = None) -> Figure | SubFigure:
        """Draws the standard deviations, and below them the shares of dead units.

        Args:
          axes: two of matplotlib's Axes, one above the other; a new figure if None.

        Returns:
          The figure.
        """
        from matplotlib.figure import Figure

        if axes is None:
            names = max(len(row.layer) for row in self.rows) / 14
            size = (max(6.0, 0.22 * len(self.rows)), 5 + names)
            figure = Figure(figsize=size, layout="constrained")
            axes = list(figure.subplots(2, sharex=True, height_ratios=(3, 1)))
        above, below = axes
        above.set(
            yscale="log", ylabel="standard deviation", title="Signal, layer by layer"
        )
        place = np.arange(len(self.rows))
        for number, direction in enumerate(("forward", "backward")):
            moments = [getattr(row, direction) for row in self.rows]
            label = "activation" if direction == "forward" else "its gradient"
            style = {"color": f"C{number}", "label": label, "markersize": 4}
            std = np.array([m.std for m in moments])
            above.plot(place, np.where(std > 0, std, np.nan), "o-", **style)
            # A logarithmic axis has no zero: it is shown at the bottom.
            for gone in place[std == 0]:
                at = {"xy": (gone, 0.01), "xycoords": above.get_xaxis_transform()}
                above.annotate("0", **at, color=f"C{number}", ha="center")
            below.plot(place, [m.dead for m in moments], "o-", **style)
        above.legend()
        below.set(ylabel="dead units", ylim=(-0.05, 1.05), xlabel="layer")
        if len(place) <= 100:
            names = [row.layer for row in self.rows]
            below.set_xticks(place, names, rotation=90, fontsize="small")
        return above.figure


@public
def signal_report(
    module: Model, params: Tree, batch: Any, loss: Callable[[Any], jax.Array]
) -> SignalReport:
    """Forward and backward signals of every layer, before any training.

        mean, std and dead units of  y_l  and of  ∂ loss(model(batch)) / ∂ y_l

    Args:
      module: an `nnx.Module`, or a Linen module; or a function that runs one, where it
        takes more than the batch: `(variables, batch)` or `(module, batch)`.
      params: Linen's variables, the NNX module for a function, None for a module alone.
      batch: what the model is called with.
      loss: the model's output to a scalar; close over the targets.

    Returns:
      One row for each layer that has parameters of its own, in the order of the calls;
      one for each layer of a scanned stack. A layer that is called often (a cell at
      every step of a sequence, a shared layer) has the averages over its calls.

    Edge cases: a layer whose output does not reach the loss has a gradient of NaN. The
    numbers are computed in float32, whatever the model's dtype, at a scale where no
    square under- or overflows; the module is not changed.

    Raises:
      ValueError: if module is neither, params are missing, or loss gives no scalar.

    >>> import jax, jax.numpy as jnp
    >>> from flax import linen as nn
    >>> module = nn.Sequential([nn.Dense(64), nn.relu, nn.Dense(1)])
    >>> batch = jax.random.normal(jax.random.key(0), (32, 8))
    >>> params = module.init(jax.random.key(1), batch)
    >>> report = signal_report(module, params, batch, lambda y: (y**2).mean())
    >>> [row.layer for row in report.rows]
    ['layers_0', 'layers_2']

    Glorot & Bengio 2010, https://proceedings.mlr.press/v9/glorot10a.html, figures 6 and
    7, for both signals.
    """
    own, run = layer_hooks.opened(module, params)
    record, called = Recorder(), []

    def hook(path: str, y: jax.Array) -> jax.Array:
        called.append(path)
        jax.debug.callback(functools.partial(record, path), *_moments(y))
        return y

    def value(own: Tree) -> jax.Array:
        scalar = loss(run(own, functools.partial(_watched, record), batch))
        if jnp.shape(scalar) != ():
            raise error(f"loss must give a scalar, got shape {jnp.shape(scalar)}.")
        return scalar

    forward = jax.jit(lambda own: run(own, hook, batch))
    outputs = record.during(lambda: forward(own))
    gradients = record.during(lambda: jax.jit(jax.grad(value))(own))
    rows = []
    for path, number in layer_hooks.in_order(called, outputs, _stack_sizes(own)):
        # The backward pass meets the layers of a scan in reverse.
        calls, returns = outputs[path], gradients.get(path, [])[::-1]
        if len(returns) != len(calls):
            returns = [(math.nan, math.nan, math.nan)] * len(calls)
        if number is None:
            layer, both = path or "(model)", (_averaged(calls), _averaged(returns))
        else:
            layer = f"{path}[{number}]"
            both = Moments(*calls[number]), Moments(*returns[number])
        rows.append(Signal(layer, *both))
    return SignalReport(tuple(rows))


_TREND = math.log(100)  # from one end to the other, at which training is in doubt
_DEAD = 0.9  # of a layer's units


def _verdict(rows: tuple[Signal, ...]) -> str:
    """See `SignalReport.verdict`."""
    healthy, faults = [], []
    for name, way in (
        ("signal", [(row.layer, row.forward) for row in rows]),
        ("gradient", [(row.layer, row.backward) for row in reversed(rows)]),
    ):
        known = [(layer, m.std) for layer, m in way if not np.isnan(m.dead)]
        broken = [layer for layer, std in known if not np.isfinite(std)]
        if broken:
            faults.append(f"{name} is not finite at {broken[0]}: exploding; {_LESS}")
            continue
        log = np.log([std for _, std in known if std > 0])
        if len(log) < 3:
            continue
        first, second = np.triu_indices(len(log), 1)
        slope = float(np.median((log[second] - log[first]) / (second - first)))
        fold = math.exp(abs(slope))
        told = f"{name} {'grows' if slope > 0 else 'falls'} {fold:.3g}-fold a layer"
        told = told if fold >= 1.005 else f"{name} keeps its size"
        if abs(slope) * (len(log) - 1) < _TREND:
            healthy.append(told)
        else:
            kind = f"exploding; {_LESS}" if slope > 0 else f"vanishing; {_MORE}"
            faults.append(f"{told}: {kind}")
    dead = [row.layer for row in rows if row.backward.dead > _DEAD]
    if dead:
        faults.append(
            f"no gradient reaches over 90 % of the units in {len(dead)} of {len(rows)} "
            f"layers, {dead[0]} first: dead; {_MORE}, unless zeros are meant"
        )
    if faults or healthy:
        return "\n".join(faults) or f"{', '.join(healthy)}: healthy"
    return "too few layers for a trend, none of them dead"


_MORE = "try he_normal or lsuv"
_LESS = "try lsuv, or zero_last for residual branches"


def mean_and_std(y: jax.Array) -> tuple[jax.Array, jax.Array]:
    """In float32, with squares taken at the scale of the largest element."""
    y = y.astype(jnp.float32)
    largest = jnp.abs(y).max(initial=0)
    scale = jnp.where((largest > 0) & jnp.isfinite(largest), largest, 1)
    y = y / scale[(None,) * y.ndim]
    return y.mean() * scale, y.std() * scale


def _moments(y: jax.Array) -> tuple[jax.Array, ...]:
    dead = (y == 0).all(tuple(range(y.ndim - 1)))
    return *mean_and_std(y), dead.astype(jnp.float32).mean()


def _share(dead: float) -> str:
    return "–" if np.isnan(dead) else f"{dead:.0%}"


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _watched(record: Recorder, path: str, y: jax.Array) -> jax.Array:
    """The same value, whose cotangent is recorded in the backward pass."""
    return y


def _watched_backward(
    record: Recorder, path: str, _: None, g: jax.Array
) -> tuple[jax.Array]:
    jax.debug.callback(functools.partial(record, path), *_moments(g))
    return (g,)


_watched.defvjp(lambda record, path, y: (y, None), _watched_backward)


def _stack_sizes(params: Tree) -> dict[str, int]:
    """How many layers are stacked at a path, for paths that have stacks."""
    return {
        info.path.rpartition("/")[0]: math.prod(
            info.shape[n] for n in info.layout.stack
        )
        for info in parameter_info.found(params)
        if info.layout.stack
    }


def _averaged(calls: list[tuple[float, ...]]) -> Moments:
    """Over several calls: the deviation of all their elements together."""
    mean, std, dead = np.array(calls).T
    together = math.hypot(np.sqrt(np.mean(np.square(std))), mean.std())
    return Moments(float(mean.mean()), together, float(dead.mean()))
