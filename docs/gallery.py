"""The gallery: one page with a picture for every rule, every set and every preset.

    rule      the norm of one spiky stream of gradients, the limit, the norm after it
    set       points of the plane, with arrows to the nearest points of the set
    preset    standard deviations of activations and of their gradients, 30 layers deep

`write` makes the pages; an entry is a line of code, which the page shows and which
draws the picture. What is drawn is what the library does: rules clip, sets project and
models are drawn and measured.

    python -m docs.gallery FOLDER      pages and pictures without a build of the site
"""

from __future__ import annotations

import concurrent.futures
import hashlib
import inspect
import multiprocessing
import pathlib
import re
import sys
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax

import optclip
from optclip import initializers as init
from optclip import sets

CODE = {"init": init, "optax": optax, "optclip": optclip, "sets": sets}  # of entries
# Okabe and Ito's colours, which colour-blind readers tell apart.
GREY, BLACK, BLUE, RED, GREEN = "0.55", "black", "#0072B2", "#D55E00", "#009E73"


class Rule(NamedTuple):
    """A rule by its code. `limit` is given where no probe can find it."""

    code: str
    limit: float | None = None


RULES = {
    "clip_by_value": Rule("optclip.clip_by_value(2.5)"),
    "clip": Rule("optclip.clip(2.5)"),
    "clip_by_norm": Rule("optclip.clip_by_norm(2.5)"),
    "clip_by_global_norm": Rule("optclip.clip_by_global_norm(2.5)"),
    "clip_by_block_rms": Rule("optclip.clip_by_block_rms(2.5)"),
    "per_example_global_norm_clip": Rule(
        "optclip.per_example_global_norm_clip(grads, 2.5)"
    ),
    "per_example_layer_norm_clip": Rule(
        "optclip.per_example_layer_norm_clip(grads, 2.5)"
    ),
    "spectral_clip": Rule("optclip.spectral_clip(2.5)"),
    "monitor": Rule("optclip.monitor()", np.inf),
    "clip_cotangent": Rule("optclip.clip_cotangent(x, 2.5)"),
    "spike_clip": Rule("optclip.spike_clip()"),
    "adaptive_grad_clip": Rule("optclip.adaptive_grad_clip(0.01)"),
    "autoclip": Rule("optclip.autoclip(percentile=90.0, window=100)"),
    "zclip": Rule("optclip.zclip()"),
    "adagc": Rule("optclip.adagc()"),
    "quantile_clip": Rule("optclip.quantile_clip()"),
    "norm_growth_clip": Rule("optclip.norm_growth_clip()"),
    "second_moment_clip": Rule("optclip.second_moment_clip()"),
    "skip_step": Rule("optclip.skip_step(optax.identity(), 5.0)", 5.0),
}
ABOUT_RULES = {
    "adaptive_grad_clip": "The parameters have norm 250, so 0.01 of it is 2.5.",
    "spectral_clip": "The gradient is a matrix with one singular value.",
    "per_example_global_norm_clip": "The batch is one example.",
    "per_example_layer_norm_clip": "The batch is one example.",
    "clip_cotangent": "The norm is that of the gradient on its way back through `x`.",
    "monitor": "It measures, and changes nothing.",
    "skip_step": "A dropped step leaves nothing: red crosses mark it.",
}

# Code by name; singular values are the coordinates of sets of matrices.
SETS = {
    "box": "sets.box(-1.0, 0.5)",
    "nonnegative": "sets.nonnegative()",
    "linf_ball": "sets.linf_ball(1.0)",
    "init_box": "sets.init_box(1.0)",
    "l2_ball": "sets.l2_ball(1.0)",
    "max_norm": "sets.max_norm(1.0)",
    "norm_sphere": "sets.norm_sphere(1.0)",
    "init_sphere": "sets.init_sphere()",
    "unit_norm": "sets.unit_norm()",
    "norm_range": "sets.norm_range(0.5, 1.2)",
    "l1_ball": "sets.l1_ball(1.0)",
    "simplex": "sets.simplex(1.0)",
    "spectral_ball": "sets.spectral_ball(1.0)",
    "orthogonal": "sets.orthogonal()",
    "intersection": "sets.intersection(sets.nonnegative(), sets.l2_ball(1.2))",
}
MATRICES = ("spectral_ball", "orthogonal")
START = (1.0, 0.4)  # of the parameters, for sets that remember it

# Code, and the model that is drawn with it.
PRESETS = {
    "zeros": ("init.zeros()", "relu"),
    "normal": ("init.normal(0.01)", "relu"),
    "truncated_normal": ("init.truncated_normal(0.1)", "relu"),
    "uniform": ("init.uniform(0.01)", "relu"),
    "sparse": ("init.sparse(0.75, stddev=0.25)", "relu"),
    "he_normal": ("init.he_normal()", "relu"),
    "he_uniform": ("init.he_uniform()", "relu"),
    "xavier_normal": ("init.xavier_normal()", "tanh"),
    "xavier_uniform": ("init.xavier_uniform()", "tanh"),
    "lecun_normal": ("init.lecun_normal()", "selu"),
    "lecun_uniform": ("init.lecun_uniform()", "selu"),
    "orthogonal": ("init.orthogonal()", "linear"),
    "delta_orthogonal": ("init.delta_orthogonal()", "conv"),
    "identity": ("init.identity()", "linear"),
    "dirac": ("init.dirac()", "conv"),
    "flax_default": ("init.flax_default()", "relu"),
    "keras_default": ("init.keras_default()", "relu"),
    "torch_default": ("init.torch_default()", "relu"),
    "gpt2": ("init.gpt2(num_layers=30)", "blocks"),
    "vit": ("init.vit()", "blocks"),
    "resnet": ("init.resnet()", "relu conv"),
    "dcgan": ("init.dcgan()", "relu conv"),
    "ppo": ("init.ppo()", "tanh policy_head"),
    "mup": ("init.mup(base_width=64)", "relu head"),
    "zero_last": ("init.zero_last(init.gpt2(num_layers=30))", "blocks"),
}
MODELS = {
    "relu": "30 dense layers of 128 units with ReLU",
    "tanh": "30 dense layers of 128 units with tanh",
    "selu": "30 dense layers of 128 units with SELU",
    "linear": "30 dense layers of 128 units with no activation",
    "conv": "30 convolutions of 3 × 3 pixels and 32 channels with no activation",
    "relu conv": "30 convolutions of 3 × 3 pixels and 32 channels with ReLU",
    "relu head": "30 dense layers of 128 units with ReLU, and a head",
    "tanh policy_head": "30 dense layers of 128 units with tanh, and a policy's head",
    "blocks": "30 residual blocks of width 64; what each adds to the residual stream",
}

KINDS = {"optclip": RULES, "optclip.sets": SETS, "optclip.initializers": PRESETS}


def page_of(full_name: str) -> str | None:
    """The gallery's page of a public name, or None."""
    place, _, name = full_name.rpartition(".")
    if name not in KINDS.get(place, ()):
        return None
    return name if place == "optclip" else f"{place.removeprefix('optclip.')}.{name}"


def papers(value: Any) -> list[str]:
    """The linked references in a docstring, as Markdown."""
    doc = inspect.getdoc(value) or ""
    return list(dict.fromkeys(re.findall(r"\[[^\[\]]+\]\(https?://[^)]+\)", doc)))


# Rules.


def stream() -> np.ndarray:
    """Norms of 400 steps: noise around a level, spikes, and a permanent doubling."""
    rng = np.random.default_rng(0)
    steps = np.arange(400)
    norms = (1 + np.exp(-steps / 20)) * np.exp(rng.normal(0, 0.15, steps.size))
    for step, times in ((60, 5), (110, 100), (111, 30), (160, 10), (350, 30)):
        norms[step] *= times
    norms[210:215] *= 20
    norms[280:] *= 2
    return norms.astype(np.float32)


def run(name: str, rule: Rule, norms: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The norms that a rule lets through, and its limits (NaN where it has none)."""
    if name == "clip_cotangent":
        through = jax.vmap(
            lambda norm: jax.grad(lambda x: norm * optclip.clip_cotangent(x, 2.5))(1.0)
        )
        return np.asarray(through(norms)), np.full_like(norms, 2.5)
    if name.startswith("per_example"):
        clip = getattr(optclip, name)
        sums: Any = jax.vmap(lambda norm: clip([norm[None, None]], 2.5)[0][0])
        return np.asarray(sums(jnp.asarray(norms)))[:, 0], np.full_like(norms, 2.5)
    tx: Any = eval(rule.code, CODE)
    # One number is its own norm, RMS, unit and singular value.
    params = jnp.full((1, 1), 250.0)

    def step(state: Any, norm: jax.Array) -> tuple[Any, Any]:
        out, new = tx.update(jnp.full((1, 1), norm), state, params)
        kinds = optclip.ClipMetrics
        nodes = jax.tree.leaves(new, is_leaf=lambda x: isinstance(x, kinds))
        told = [x.limit for x in nodes if isinstance(x, kinds) and x.limit is not None]
        # Where no metric tells the limit, it is what a huge gradient is clipped to.
        probe, _ = tx.update(jnp.full((1, 1), 1e9), state, params)
        return new, (out[0, 0], min(told) if told else probe[0, 0])

    _, (out, limits) = jax.jit(lambda x: jax.lax.scan(step, tx.init(params), x))(norms)
    out, limits = np.asarray(out), np.asarray(limits)
    if rule.limit is not None:
        limits = np.full_like(norms, rule.limit)
    return out, np.where(limits < 1e30, limits, np.nan)


def draw_rule(name: str, ax: Any) -> None:
    norms, steps = stream(), np.arange(400)
    out, limits = run(name, RULES[name], norms)
    ax.plot(steps, norms, color=GREY, linewidth=2.5, label="norm in")
    if np.isfinite(limits).any():
        ax.plot(steps, limits, color=BLUE, linestyle="--", linewidth=1.5, label="limit")
    passed = np.where(out > 0, out, np.nan)
    ax.plot(steps, passed, color=BLACK, linewidth=1, label="norm out")
    if (dropped := steps[out == 0]).size:
        at = np.full(dropped.size, 0.5)
        ax.plot(dropped, at, "x", color=RED, label=f"dropped: {dropped.size}")
    ax.set(yscale="log", ylim=(0.4, 200), xlim=(0, 400), xlabel="step")
    ax.set_yticks([1, 10, 100], ["1", "10", "100"])
    ax.set_ylabel("norm of the gradient")
    ax.legend(ncols=4, loc="upper right", fontsize="small")


# Sets.


def project(name: str, points: np.ndarray) -> np.ndarray:
    """The nearest points of a set, of all points (n, 2) at once."""
    constraint = eval(SETS[name], CODE)

    def vector(point: jax.Array) -> Any:
        if name in MATRICES:
            matrix = jnp.diag(point)
            return jnp.diag(optclip.project_params(matrix, constraint))
        kernel = point[:, None]  # one unit with two inputs
        if not name.startswith("init_"):
            return cast(Any, optclip.project_params(kernel, constraint))[:, 0]
        start = jnp.asarray(START)[:, None]
        tx: Any = optclip.project(constraint)
        updates, _ = tx.update(kernel - start, tx.init(start), start)
        return cast(Any, optax.apply_updates(start, updates))[:, 0]

    return np.asarray(jax.jit(jax.vmap(vector))(jnp.asarray(points)))


def draw_set(name: str, ax: Any) -> None:
    line = np.linspace(-2.2, 2.2, 60, dtype=np.float32)  # without 0, a kink of norms
    everywhere = np.stack(np.meshgrid(line, line), -1).reshape(-1, 2)
    few = np.linspace(-1.9, 1.9, 6, dtype=np.float32)
    points = np.stack(np.meshgrid(few, few), -1).reshape(-1, 2)
    nearest = project(name, np.concatenate([everywhere, points]))
    ax.plot(*nearest[: len(everywhere)].T, "o", color=BLUE, markersize=3, alpha=0.35)
    nearest = nearest[len(everywhere) :]
    for (x, y), (u, v) in zip(points, nearest, strict=True):
        moved = np.hypot(u - x, v - y) > 0.02
        ax.plot(x, y, "o", color=BLACK, markersize=4, markerfacecolor="white")
        if moved:
            style = {"arrowstyle": "->", "color": RED, "shrinkA": 2, "shrinkB": 0}
            ax.annotate("", (u, v), (x, y), arrowprops=style)
    if name.startswith("init_"):
        ax.plot(*START, "*", color=GREEN, markersize=14, label="at the start")
        ax.legend(loc="upper left", fontsize="small")
    ax.set(xlim=(-2.2, 2.2), ylim=(-2.2, 2.2), aspect="equal")
    kind = "entry of the diagonal" if name in MATRICES else "weight"
    ax.set(xlabel=f"first {kind}", ylabel=f"second {kind}")


# Presets.


def signal(preset: init.Preset, model: str) -> dict[str, np.ndarray]:
    """Standard deviations of activations and of their gradients, by layer."""
    from flax import linen as nn

    width = 64 if model == "blocks" else 32 if "conv" in model else 128
    name, _, head = model.partition(" ")
    activation = getattr(nn, name) if name in ("relu", "tanh", "selu") else lambda x: x

    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array, _: None) -> tuple[jax.Array, None]:
            if model == "blocks":
                y = nn.gelu(nn.Dense(4 * width, name="fc")(nn.LayerNorm(name="ln")(x)))
                return x + nn.Dense(width, name="c_proj")(y), None
            layer = nn.Conv(width, (3, 3)) if "conv" in model else nn.Dense(width)
            return activation(layer(x)), None

    depth = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}
    module = nn.scan(Layer, **depth, length=30)(name="layers")

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            x, _ = module.clone(parent=self, name="layers")(x, None)
            return nn.Dense(width, name=head)(x) if "head" in head else x

    shape = (16, 8, 8, width) if "conv" in model else (256, width)
    keys = jax.random.split(jax.random.key(0), 3)
    batch = jax.random.normal(keys[0], shape)
    params = jax.eval_shape(Model().init, keys[1], batch)
    params = init.redraw(params, preset, keys[1])
    cotangent = jax.random.normal(keys[2], shape)
    report = init.signal_report(Model(), params, batch, lambda y: (y * cotangent).sum())
    rows = [r for r in report.rows if model != "blocks" or "c_proj[" in r.layer]
    return {
        "activation": np.array([row.forward.std for row in rows]),
        "its gradient": np.array([row.backward.std for row in rows]),
    }


def draw_preset(name: str, ax: Any) -> None:
    code, model = PRESETS[name]
    styles = (BLUE, "o-"), (RED, "s--")
    for (label, std), (colour, style) in zip(
        signal(eval(code, CODE), model).items(), styles, strict=True
    ):
        layers = np.arange(1, len(std) + 1)
        shown = np.where(std > 0, std, np.nan)
        gone = f", 0 in {(std == 0).sum()} layers" if (std == 0).any() else ""
        ax.plot(layers, shown, style, color=colour, markersize=4, label=label + gone)
    ax.axhline(1, color=GREY, linewidth=0.8)
    ax.set(yscale="log", xlabel="layer", ylabel="standard deviation")
    # A signal that is kept must look kept: at least four decades.
    ax.set_xlim(0, 32)
    low, high = ax.get_ylim()
    ax.set_ylim(min(low, 1e-2), max(high, 1e2))
    ax.legend(fontsize="small")


# Pages.

DRAW = {
    "optclip": (draw_rule, (8.0, 3.2)),
    "optclip.sets": (draw_set, (4.6, 4.6)),
    "optclip.initializers": (draw_preset, (8.0, 3.2)),
}
TITLES = {
    "optclip": "Rules",
    "optclip.sets": "Sets",
    "optclip.initializers": "Presets",
}
LEGENDS = {
    "optclip": "Grey is the norm of each gradient: noise around a level that falls at "
    "first, single spikes, five in a row, and from step 280 on twice the level for "
    "good. Dashed blue is the limit, black what comes out.",
    "optclip.sets": "Circles are parameters, arrows lead to the nearest point of the "
    "set, which is blue. A circle without an arrow lies in the set.",
    "optclip.initializers": "The signal at initialization, before any training, by "
    "`signal_report`: the standard deviation of each layer's output, and of the "
    "gradient that comes back to it. Where both stay level, the network can train.",
}


def draw(place: str, name: str, file: pathlib.Path) -> None:
    from matplotlib.figure import Figure

    function, size = DRAW[place]
    figure = Figure(figsize=size, layout="constrained")
    function(name, figure.subplots())
    figure.savefig(file, dpi=110, metadata={"Software": None})


def text(place: str, name: str) -> str:
    """One page: the code, the picture, what it shows, and where to read on."""
    value = getattr(sys.modules[place], name)
    entry = KINDS[place][name]
    page = page_of(f"{place}.{name}")
    if isinstance(entry, Rule):
        code, about = entry.code, ABOUT_RULES.get(name, "")
    elif isinstance(entry, tuple):
        code, about = entry[0], f"The model: {MODELS[entry[1]]}."
    else:
        code, about = entry, ""
    imports = {
        "optclip": "import optclip" + "\nimport optax" * ("optax" in code),
        "optclip.sets": "import optclip\nfrom optclip import sets",
        "optclip.initializers": "from optclip import initializers as init",
    }[place]
    summary = re.split(r"\n\n", inspect.getdoc(value) or "")[0].replace("\n", " ")
    where = f"Arguments and edge cases: [`{name}`](../api/{place}.{name}.rst)."
    if found := papers(value):
        where += f" From {' and '.join(found)}."
    return "\n\n".join(
        [
            f"# {name}",
            summary,
            f"```python\n{imports}\n\n{code}\n```",
            f"```{{image}} {page}.png\n:alt: The picture of {name}\n```",
            f"{LEGENDS[place]} {about}".rstrip(),
            where + "\n",
        ]
    )


def index() -> str:
    """The thumbnails, in three groups."""
    programs = "Whole programs have theirs on the page of [examples](../examples.md)."
    parts = ["# Gallery", f"One picture for every rule, set and preset. {programs}"]
    for place, entries in KINDS.items():
        title, legend = TITLES[place], LEGENDS[place]
        columns = "2 3 4 4" if place == "optclip.sets" else "1 2 2 3"
        cards = [f"::::{{grid}} {columns}", ":gutter: 2", ""]
        for name in entries:
            page = page_of(f"{place}.{name}")
            cards += [
                f":::{{grid-item-card}} {name}",
                f":link: {page}",
                ":link-type: doc",
                f":img-bottom: {page}.png",
                f":img-alt: the picture of {name}",
                ":::",
                "",
            ]
        parts += [f"## {title}", legend, "\n".join([*cards, "::::"])]
        pages = [str(page_of(f"{place}.{name}")) for name in entries]
        parts += ["\n".join(["```{toctree}", ":hidden:", "", *pages, "```"])]
    return "\n\n".join(parts) + "\n"


def write(docs: pathlib.Path) -> None:
    """The pages and pictures, into docs/gallery; nothing if nothing has changed."""
    from docs.api_pages import put

    folder = docs / "gallery"
    folder.mkdir(parents=True, exist_ok=True)
    sources = [pathlib.Path(__file__)]
    sources += sorted(pathlib.Path(optclip.__file__).parent.rglob("*.py"))
    state = hashlib.sha256(b"".join(file.read_bytes() for file in sources)).hexdigest()
    stamp = folder / ".made-from"
    if stamp.exists() and stamp.read_text() == state:
        return
    names = [(place, name) for place, entries in KINDS.items() for name in entries]
    pages = [folder / f"{page_of(f'{place}.{name}')}" for place, name in names]
    # Two processes, because nearly all of the time is compiling on one core.
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(2, mp_context=spawn) as pool:
        pictures = [page.with_name(f"{page.name}.png") for page in pages]
        list(pool.map(draw, *zip(*names, strict=True), pictures, chunksize=6))
    for page, own in zip(pages, names, strict=True):
        put(page.with_name(f"{page.name}.md"), text(*own))
    put(folder / "index.md", index())
    stamp.write_text(state)


if __name__ == "__main__":  # python -m docs.gallery FOLDER
    write(pathlib.Path(sys.argv[1]))
