"""Adaptive rules, flat, in NumPy float64: each paper's algorithm, from its equations.

Each takes the norms of one group over time (AdaGC those of all groups, SPAM and AGC the
gradients themselves) and gives the norms that come out. A norm that is not finite comes
out as NaN and is not learned from: to the rule, that step did not happen.
"""

import numpy as np

Norms = np.ndarray  # (steps,) float64


def autoclip(
    norms: Norms, percentile: float = 10.0, window: int = 1000, multiple: float = 1.0
) -> Norms:
    """Seetharaman et al. 2020, with a window; norms of zero are not remembered."""
    history: list[float] = []
    out = []
    for norm in norms:
        if not np.isfinite(norm):
            out.append(np.nan)
        elif norm == 0:
            out.append(0.0)
        else:
            history = [*history, norm][-window:]
            limit = multiple * np.percentile(history, percentile, method="linear")
            out.append(min(norm, limit))
    return np.array(out)


def scaled_adam(norms: Norms, clipping_scale: float = 2.0, window: int = 100) -> Norms:
    """ScaledAdam's rule (Yao et al. 2023): a multiple of the median of the history.

    At every step, where icefall recomputes the median every `window` steps.
    """
    history: list[float] = []
    out = []
    for norm in norms:
        if not np.isfinite(norm):
            out.append(np.nan)
            continue
        if norm > 0:
            history.append(norm)
        median = np.median(history[-window:]) if history else np.inf
        out.append(min(norm, clipping_scale * median))
    return np.array(out)


def zclip(
    norms: Norms,
    z_threshold: float = 2.5,
    decay: float = 0.97,
    warmup_steps: int = 25,
    mode: str = "reciprocal",
    max_norm: float = np.inf,
    eps: float = 1e-6,
) -> Norms:
    """Kumar et al. 2025; norms of zero, which the paper never meets, teach nothing."""
    first: list[float] = []
    mean = variance = np.nan
    out = []
    for norm in norms:
        if not np.isfinite(norm):
            out.append(np.nan)
            continue
        if norm == 0:
            out.append(0.0)
            continue
        if len(first) < warmup_steps:
            first.append(norm)
            mean, variance = np.mean(first), np.var(first)
            out.append(min(norm, max_norm))
            continue
        deviation = np.sqrt(variance)
        z = (norm - mean) / (deviation + eps)
        clipped = norm
        if z > z_threshold and mode == "reciprocal":
            clipped = mean + z_threshold * deviation / (z / z_threshold)
        elif z > z_threshold and mode == "mean":
            clipped = mean
        elif z > z_threshold and mode == "max":
            clipped = mean + z_threshold * deviation
        mean = decay * mean + (1 - decay) * clipped
        variance = decay * variance + (1 - decay) * (clipped - mean) ** 2
        out.append(min(clipped, max_norm))
    return np.array(out)


def robust(
    norms: Norms,
    z: float = 3.0,
    window: int = 48,
    prior_spread: float = 0.22,
    prior_steps: float = 8.0,
) -> Norms:
    """The library's own: a median of the past, and a spread in log space above it.

    Of an even number of values the median is the lower of the two in the middle.
    """
    history: list[float] = []
    out = []
    for norm in norms:
        if not np.isfinite(norm):
            out.append(np.nan)
            continue
        limit = np.inf
        if history:
            logs = np.log(history[-window:])
            count = len(logs)
            centre = np.sort(logs)[(count - 1) // 2]
            deviation = 1.4826 * np.sort(np.abs(logs - centre))[(count - 1) // 2]
            spread = count * deviation + prior_steps * prior_spread
            limit = np.exp(centre + z * spread / (count + prior_steps))
        out.append(min(norm, limit))
        if norm > 0:
            history.append(norm)
    return np.array(out)


def adagc(
    norms: Norms,
    relative: float = 1.05,
    absolute: float = 1.0,
    decay: float = 0.98,
    warmup_steps: int = 100,
) -> Norms:
    """Wang et al. 2025; norms (steps, groups). A gradient of zero sets no average.

    The global norm of the warm-up is that of the groups which are finite.
    """
    steps, groups = norms.shape
    average: list[float | None] = [None] * groups
    seen = [0] * groups
    out = np.full((steps, groups), np.nan)
    for t in range(steps):
        finite = norms[t][np.isfinite(norms[t])]
        whole = np.sqrt(np.sum(finite**2))
        share = min(1.0, absolute / whole) if whole > 0 else 1.0
        for i in range(groups):
            norm = norms[t, i]
            if not np.isfinite(norm):
                continue
            warming = seen[i] < warmup_steps
            seen[i] += 1
            last = average[i]
            if warming or last is None:
                out[t, i] = norm * share
                if out[t, i] > 0:
                    average[i] = out[t, i] if last is None else min(last, out[t, i])
            else:
                out[t, i] = min(norm, relative * last)
                if out[t, i] > 0:
                    average[i] = decay * last + (1 - decay) * out[t, i]
    return out


def online_quantile(
    norms: Norms, quantile: float = 0.5, learning_rate: float = 0.2
) -> Norms:
    """Andrew et al. 2019, the geometric update, on one norm a step; starts at it."""
    limit = None
    out = []
    for norm in norms:
        if not np.isfinite(norm):
            out.append(np.nan)
        elif norm == 0:
            out.append(0.0)
        elif limit is None:
            limit = norm
            out.append(norm)
        else:
            out.append(min(norm, limit))
            below = 1.0 if norm <= limit else 0.0
            limit *= np.exp(-learning_rate * (below - quantile))
    return np.array(out)


def norm_growth(norms: Norms, gamma: float = 1.01) -> Norms:
    """Fira's limiter (Chen et al. 2024), without its 1e-8 and not held at zero."""
    last = None
    out = []
    for norm in norms:
        if not np.isfinite(norm):
            out.append(np.nan)
            continue
        ratio = 1.0 if last is None else max(norm / last, gamma) / gamma
        out.append(norm / ratio)
        if norm > 0:
            last = norm / ratio
    return np.array(out)


def spam(
    values: np.ndarray,
    theta: float = 5000.0,
    decay: float = 0.999,
    warmup_steps: int = 20,
) -> np.ndarray:
    """SPAM's spike rule (Huang et al. 2025) on (steps, *shape) elements."""
    second = np.zeros(values.shape[1:])
    out = np.full(values.shape, np.nan)
    for t, g in enumerate(values):
        active = (t >= warmup_steps) & (second > 0)
        with np.errstate(invalid="ignore"):
            spike = active & (g**2 > theta * second)
            clipped = np.where(spike, np.sign(g) * np.sqrt(theta * second), g)
            learned = decay * second + (1 - decay) * clipped**2
        finite = np.isfinite(g)
        second = np.where(finite, learned, second)
        out[t] = np.where(finite, clipped, np.nan)
    return out


def agc(
    gradient: np.ndarray,
    weight: np.ndarray,
    units: tuple[int, ...],
    clipping: float = 0.01,
    eps: float = 1e-3,
) -> np.ndarray:
    """Brock et al. 2021. `units` are the axes that count units: outputs and layers."""
    out = np.array(gradient, np.float64)
    for unit in np.ndindex(*(gradient.shape[axis] for axis in units)):
        chosen = np.ones(gradient.shape, bool)
        for axis, index in zip(units, unit, strict=True):
            chosen &= np.indices(gradient.shape)[axis] == index
        g = np.sqrt(np.sum(gradient[chosen].astype(np.float64) ** 2))
        w = np.sqrt(np.sum(weight[chosen].astype(np.float64) ** 2))
        bound = clipping * max(w, eps)
        if g > bound:
            out[chosen] *= bound / g
    return out
