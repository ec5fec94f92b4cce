"""Nearest points of sets, flat, in NumPy float64: one group, an array of any shape.

Written from the definitions and not from the library: thresholds are found by
bisection, spheres by division, singular values by NumPy.
"""

import numpy as np

Bound = float | np.ndarray


def box(x: np.ndarray, lower: Bound, upper: Bound) -> np.ndarray:
    """Each element on its own."""
    return np.minimum(np.maximum(x, lower), upper)


def l2_ball(x: np.ndarray, radius: float) -> np.ndarray:
    """Back along the ray from the centre."""
    size = np.sqrt(np.sum(np.abs(x) ** 2))
    return x if size <= radius else x * (radius / size)


def norm_sphere(x: np.ndarray, radius: float) -> np.ndarray:
    """The same, from both sides; zero stays."""
    size = np.sqrt(np.sum(np.abs(x) ** 2))
    return x if size == 0 else x * (radius / size)


def hyperball(
    w: np.ndarray,
    u: np.ndarray,
    rate: float,
    tangent: bool = False,
    radius: float = 0.0,
) -> np.ndarray:
    """Where a step of a fixed relative size leads, on the sphere of w or a radius."""
    radius = radius or float(np.sqrt(np.sum(np.abs(w) ** 2)))
    if tangent:
        share = np.sum(np.real(u * np.conj(w))) / np.sum(np.abs(w) ** 2)
        u = u - share * w
    return norm_sphere(w + norm_sphere(u, rate * radius), radius)


def norm_range(x: np.ndarray, low: float, high: float, rate: float = 1.0) -> np.ndarray:
    """Keras' MinMaxNorm, without its 1e-7."""
    size = np.sqrt(np.sum(np.abs(x) ** 2))
    if size == 0:
        return x
    wanted = rate * min(max(size, low), high) + (1 - rate) * size
    return x * (wanted / size)


def _threshold(x: np.ndarray, total: float) -> float:
    """The t for which Σ max(x - t, 0) is the total, by bisection."""
    low, high = np.min(x) - total, np.max(x)
    for _ in range(200):
        middle = (low + high) / 2
        too_low = np.sum(np.maximum(x - middle, 0)) > total
        low, high = (middle, high) if too_low else (low, middle)
    return (low + high) / 2


def simplex(x: np.ndarray, total: float) -> np.ndarray:
    """Euclid's nearest probabilities."""
    return np.maximum(x - _threshold(x, total), 0)


def l1_ball(x: np.ndarray, radius: float) -> np.ndarray:
    """Soft thresholding."""
    if np.sum(np.abs(x)) <= radius:
        return x
    return np.sign(x) * simplex(np.abs(x), radius)


def spectral_ball(x: np.ndarray, radius: float) -> np.ndarray:
    """Of a matrix."""
    u, s, vt = np.linalg.svd(x, full_matrices=False)
    return (u * np.minimum(s, radius)) @ vt


def orthogonal(x: np.ndarray) -> np.ndarray:
    """Of a matrix of full rank."""
    u, _, vt = np.linalg.svd(x, full_matrices=False)
    return u @ vt


def qk_clip(
    query: np.ndarray, key: np.ndarray, largest: np.ndarray, tau: float
) -> tuple[np.ndarray, np.ndarray]:
    """Kernels (features, heads, depth), head by head; key heads may be fewer."""
    query, key = query.copy(), key.copy()
    share = query.shape[1] // key.shape[1]
    for group in range(key.shape[1]):
        heads = range(group * share, (group + 1) * share)
        gammas = [min(1.0, tau / largest[head]) for head in heads]
        key[:, group] *= np.sqrt(min(gammas))
        for head, gamma in zip(heads, gammas, strict=True):
            query[:, head] *= gamma / np.sqrt(min(gammas))
    return query, key
