"""The signal report and LSUV, in both Flax APIs, against values by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
import pytest
from flax import linen as nn
from flax import nnx

from optclip._core import paths as _paths
from optclip.initializers import (
    SignalReport,
    he_normal,
    lsuv,
    normal,
    redraw,
    signal_report,
    torch_default,
    zero_last,
    zeros,
)
from optclip.initializers.signal_report import Moments, Signal, mean_and_std
from tests.untyped import untyped

from .models import LAYERS, TEXT, NnxTransformer, Transformer

KEY = jax.random.key(0)
X = jax.random.normal(KEY, (32, 8))


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3, name="last")(nn.relu(nn.Dense(16, name="first")(x)))


class Nnx(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(8, 16, rngs=rngs)
        self.last = nnx.Linear(16, 3, rngs=rngs)

    def __call__(self, x):
        return self.last(nnx.relu(self.first(x)))


def mean_square(y):
    return jnp.mean(y**2)


@pytest.fixture(scope="module")
def params():
    tree = redraw(jax.eval_shape(Linen().init, KEY, X), he_normal(), KEY)
    # A unit of the first layer that no example wakes.
    return shifted(tree)


def by_hand(params):
    """Activations and cotangents of both layers."""
    first, last = params["params"]["first"], params["params"]["last"]
    hidden = X @ first["kernel"] + first["bias"][None]
    out = nn.relu(hidden) @ last["kernel"] + last["bias"][None]
    d_out = 2 * out / out.size
    d_hidden = (d_out @ last["kernel"].T) * (hidden > 0).astype(hidden.dtype)
    return {"first": (hidden, d_hidden), "last": (out, d_out)}


def check(row, arrays):
    for moments, array in zip((row.forward, row.backward), arrays, strict=True):
        assert moments.mean == pytest.approx(float(array.mean()), rel=1e-4, abs=1e-7)
        assert moments.std == pytest.approx(float(array.std()), rel=1e-4)
        dead = np.mean((np.asarray(array) == 0).all(0))
        assert moments.dead == pytest.approx(dead)


def as_nnx(params):
    model = Nnx(nnx.Rngs(0))
    for name in ("first", "last"):
        layer = getattr(model, name)
        layer.kernel = nnx.Param(params["params"][name]["kernel"])
        layer.bias = nnx.Param(params["params"][name]["bias"])
    return model


@pytest.mark.parametrize("api", ["linen", "linen function", "nnx", "nnx function"])
def test_moments_are_those_by_hand(api, params):
    model = as_nnx(params)
    module, held = {
        "linen": (Linen(), params),
        "linen function": (lambda v, x: Linen().apply(v, x), params),
        "nnx": (model, None),
        "nnx function": (lambda m, x: m(x), model),
    }[api]
    report = signal_report(module, held, X, mean_square)
    assert [row.layer for row in report.rows] == ["first", "last"]
    for row in report.rows:
        check(row, by_hand(params)[row.layer])
    assert report.rows[0].backward.dead == 1 / 16
    assert type(model.first) is nnx.Linear


def test_the_table_and_the_picture(params, tmp_path):
    Figure = pytest.importorskip("matplotlib.figure").Figure
    report = signal_report(Linen(), params["params"], X, mean_square)
    lines = str(report).splitlines()
    assert lines[1].split() == ["layer", *["mean", "std", "dead"] * 2]
    assert lines[2].startswith("first") and lines[2].endswith("6%")
    figure = untyped(report.plot())
    assert isinstance(figure, Figure)
    figure.savefig(tmp_path / "signal.png")
    labels = [tick.get_text() for tick in figure.axes[1].get_xticklabels()]
    assert labels == ["first", "last"]
    own = Figure().subplots(2)
    assert report.plot(own) is own[0].figure


def test_a_layer_with_parameters_and_layers_of_its_own_has_a_row():
    class Scaled(nn.Module):
        @nn.compact
        def __call__(self, x):
            scale = self.param("scale", nn.initializers.constant(3.0), ())
            return scale * nn.Dense(8, name="dense")(x)

    report = signal_report(Scaled(), Scaled().init(KEY, X), X, mean_square)
    rows = {row.layer: row.forward.std for row in report.rows}
    assert rows["(model)"] == pytest.approx(3 * rows["dense"], rel=1e-5)


def test_zeros_show_in_the_report(params):
    dead = redraw(params, zeros(), KEY)
    report = signal_report(Linen(), dead, X, lambda y: mean_square(y - 1))
    first, last = report.rows
    assert first.forward.std == 0 and last.forward.dead == 1
    assert first.backward.dead == 1 and last.backward.dead == 0
    pytest.importorskip("matplotlib")
    report.plot()


def report(forward, backward, dead: npt.ArrayLike = 0.0):
    """Of layers with these standard deviations, from the first to the last."""
    dead = np.broadcast_to(dead, len(forward))
    rows = zip(forward, backward, dead, strict=True)
    return SignalReport(
        tuple(
            Signal(f"fc{n}", Moments(0.0, y, 0.0), Moments(0.0, g, d))
            for n, (y, g, d) in enumerate(rows)
        )
    )


FLAT, RISE = np.ones(10), 2.0 ** np.arange(10)  # 512-fold in all


@pytest.mark.parametrize(
    ("signals", "verdict"),
    [
        ((FLAT, FLAT), "signal keeps its size, gradient keeps its size: healthy"),
        ((FLAT, RISE), "gradient falls 2-fold a layer: vanishing; try he_normal"),
        ((FLAT, RISE[::-1]), "gradient grows 2-fold a layer: exploding; try lsuv"),
        ((RISE, FLAT), "signal grows 2-fold a layer: exploding; try lsuv"),
        ((RISE[::-1], FLAT), "signal falls 2-fold a layer: vanishing; try he_normal"),
        ((RISE, RISE), "signal grows 2-fold a layer: exploding; try lsuv, or zero_"),
        # 99-fold is none, 101-fold is one.
        ((FLAT, 99 ** np.linspace(0, 1, 10)), "signal keeps its size, gradient"),
        ((FLAT, 101 ** np.linspace(0, 1, 10)), "gradient falls 1.67-fold a layer: v"),
        # A layer of another kind at the end, or in the middle, makes no trend.
        ((FLAT, np.r_[np.ones(9), 1e9]), "signal keeps its size, gradient"),
        (
            (FLAT, np.r_[np.ones(5), 1e9, np.ones(4)]),
            "signal keeps its size, gradient keeps its size: ",
        ),
        # What does not reach the loss, or is zero, has no ratio.
        ((FLAT, np.where(FLAT, np.nan, 0), np.nan), "signal keeps its size: healthy"),
        ((np.zeros(10), FLAT), "gradient keeps its size: healthy"),
        ((FLAT[:2], RISE[:2]), "too few layers for a trend, none of them dead"),
        (([1.0, np.inf, np.nan], FLAT[:3]), "signal is not finite at fc1: exploding"),
        ((FLAT[:3], [np.nan, np.inf, 1]), "gradient is not finite at fc1: exploding"),
        ((FLAT, FLAT, [0, *[0.95] * 2, *[0.9] * 7]), "no gradient reaches over 90 % "),
    ],
)
def test_the_verdict(signals, verdict):
    assert report(*signals).verdict.startswith(verdict)
    assert str(report(*signals)).endswith(report(*signals).verdict)


def test_a_verdict_has_a_line_for_each_fault():
    lines = report(RISE, RISE, [1.0, *[0.0] * 9]).verdict.splitlines()
    assert [line.split(":")[1].split(";")[0] for line in lines] == [
        *(" exploding", " vanishing", " dead")
    ]
    assert "in 1 of 10 layers, fc0 first" in lines[2]


class Rectified(nn.Module):
    @nn.compact
    def __call__(self, x):
        for _ in range(12):
            x = nn.relu(nn.Dense(32)(x))
        return nn.Dense(1, name="head")(x)


@pytest.mark.parametrize(
    ("preset", "words"),
    [
        (he_normal(), ["healthy"]),
        (torch_default(), ["gradient falls", "vanishing"]),
        (normal(1.0), ["signal grows", "gradient grows", "exploding"]),
        (zeros(), ["no gradient reaches", "12 of 13 layers, Dense_0 first", "dead"]),
        (zero_last(he_normal()), ["dead", "unless zeros are meant"]),
    ],
    ids=str,
)
def test_the_verdict_of_a_deep_network(preset, words):
    params = redraw(jax.eval_shape(Rectified().init, KEY, X), preset, KEY)
    verdict = signal_report(
        Rectified(), params, X, lambda y: mean_square(y - 1)
    ).verdict
    for word in words:
        assert word in verdict
    assert ("healthy" in verdict) == (preset == he_normal())


@pytest.mark.parametrize("api", ["linen", "nnx"])
def test_each_layer_of_a_scanned_stack_has_a_row(api):
    if api == "linen":
        module, held = Transformer(), Transformer().init(KEY, TEXT)
    else:
        module, held = NnxTransformer(nnx.Rngs(0)), None
    report = signal_report(module, held, TEXT, mean_square)
    rows = {row.layer: row for row in report.rows}
    for i in range(LAYERS):
        assert rows[f"blocks/c_proj[{i}]"].backward.std > 0
        assert rows[f"blocks/norm_0[{i}]"].forward.std == pytest.approx(1, abs=0.1)
    assert report.verdict.endswith("healthy")
    order = [row.layer for row in report.rows]
    assert order.index("blocks/c_proj[0]") < order.index("blocks/fc[1]")
    assert rows["token.attend"].backward.std > 0
    assert "token" in rows and "position" in rows


def test_gradients_of_a_scanned_stack_are_numbered_like_its_outputs():
    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return nn.Dense(8, use_bias=False, name="dense")(x), None

    split = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}
    module = nn.scan(Layer, length=3, **split)()
    factors = np.array([1.0, 10.0, 100.0], np.float32)
    kernel = jnp.asarray(factors[:, None, None] * np.eye(8, dtype=np.float32))
    rows = signal_report(
        lambda v, x: module.apply(v, x, None)[0],
        {"params": {"dense": {"kernel": kernel}}},
        X,
        lambda y: jnp.sum(y * X),
    ).rows
    # Forward: all factors up to the layer's own. Backward: all that follow it.
    for row, there, back in zip(rows, (1, 10, 1000), (1000, 100, 1), strict=True):
        std = float(X.std())
        assert row.forward.std == pytest.approx(there * std, rel=1e-4)
        assert row.backward.std == pytest.approx(back * std, rel=1e-4)


class Deep(nn.Module):
    """Thirty tanh layers of 64, the first of which is called first."""

    @nn.compact
    def __call__(self, x):
        for _ in range(30):
            x = nn.tanh(nn.Dense(64)(x))
        return x


def test_gradients_whose_square_underflows_are_reported():
    batch = jax.random.normal(KEY, (16, 64))
    params = redraw(jax.eval_shape(Deep().init, KEY, batch), normal(0.02), KEY)
    first = signal_report(Deep(), params, batch, jnp.sum).rows[0].backward
    # By hand, in float64.
    layers = [params["params"][f"Dense_{i}"]["kernel"] for i in range(30)]
    kernels = [np.asarray(kernel, np.float64) for kernel in layers]
    outputs, x = [], np.asarray(batch, np.float64)
    for kernel in kernels:
        outputs.append(x := np.tanh(x @ kernel))
    gradient = 1 - outputs[-1] ** 2
    for kernel, y in zip(kernels[:0:-1], outputs[-2::-1], strict=True):
        gradient = (1 - y**2) * (gradient @ kernel.T)
    assert 0 < gradient.var() < 1e-40
    assert first.std == pytest.approx(gradient.std(), rel=1e-3)
    assert first.mean == pytest.approx(gradient.mean(), rel=1e-3)


@pytest.mark.parametrize("size", [1e-30, 1e-19, 1e19, 1e37])
def test_moments_at_any_scale(size):
    values = np.float64(X) + 0.3
    mean, std = mean_and_std(jnp.asarray(size * values, jnp.float32))
    assert float(mean) == pytest.approx(size * values.mean(), rel=1e-5)
    assert float(std) == pytest.approx(size * values.std(), rel=1e-5)


def test_lsuv_scales_kernels_whose_outputs_square_to_zero(params):
    tiny = jax.tree.map(lambda leaf: 1e-25 * leaf, redraw(params, he_normal(), KEY))
    for layer, variance in variances(Linen(), lsuv(Linen(), X, tiny), X).items():
        assert variance == pytest.approx(1, abs=0.1), layer


@pytest.mark.parametrize("lift", [nn.remat, nn.jit])
def test_layers_inside_other_transforms_of_a_scan_are_recorded(lift):
    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return nn.Dense(8, name="dense")(x), None

    split = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}
    module = nn.scan(lift(Layer), length=3, **split)()
    rows = signal_report(
        lambda v, x: module.apply(v, x, None)[0],
        module.init(KEY, X, None),
        X,
        mean_square,
    ).rows
    assert [row.layer for row in rows] == [f"dense[{i}]" for i in range(3)]


def test_a_layer_that_is_called_often_is_averaged():
    module = nn.RNN(nn.GRUCell(8))
    batch = jax.random.normal(KEY, (4, 5, 8))
    report = signal_report(module, module.init(KEY, batch), batch, mean_square)
    names = [row.layer for row in report.rows]
    assert len(names) == len(set(names)) == 6 and not any("[" in n for n in names)
    # Five steps of an input gate are one product.
    kernel = module.init(KEY, batch)["params"]["cell"]["in"]["kernel"]
    row = report.rows[names.index("cell/in")]
    std = jnp.std(batch @ untyped(kernel))
    assert row.forward.std == pytest.approx(float(std), rel=1e-3)


def test_what_does_not_reach_the_loss_has_no_gradient():
    class Aside(nnx.Module):
        def __init__(self, rngs):
            self.used = nnx.Linear(8, 8, rngs=rngs)
            self.aside = nnx.Linear(8, 8, rngs=rngs)

        def __call__(self, x):
            jax.lax.stop_gradient(self.aside(x))
            return self.used(x)

    used, aside = sorted(
        signal_report(Aside(nnx.Rngs(0)), None, X, mean_square).rows,
        key=lambda row: row.layer == "aside",
    )
    assert np.isnan(aside.backward.std) and aside.forward.std > 0
    assert used.backward.std > 0


def variances(module, held, batch):
    report = signal_report(module, held, batch, mean_square)
    return {row.layer: row.forward.std**2 for row in report.rows}


@pytest.mark.parametrize("key", [None, jax.random.key(1)])
def test_lsuv_gives_each_layer_unit_variance(key, params):
    batch = 7 * X
    params = redraw(params, he_normal(), KEY)  # without the dead unit
    new = lsuv(Linen(), batch, params, key=key, tolerance=0.01)
    assert jax.tree.structure(new) == jax.tree.structure(params)
    for layer, variance in variances(Linen(), new, batch).items():
        assert variance == pytest.approx(1, abs=0.011), layer
    if key is None:  # directions and biases stay
        for name, layer in new["params"].items():
            before = params["params"][name]
            np.testing.assert_array_equal(layer["bias"], before["bias"])
            ratio = np.asarray(layer["kernel"] / before["kernel"])
            np.testing.assert_allclose(ratio, ratio[0, 0], rtol=1e-5)


@pytest.mark.parametrize(
    ("start", "moves"), [(1.08, False), (0.92, False), (1.15, True)]
)
def test_lsuv_leaves_what_is_within_its_tolerance(start, moves):
    module, x = nn.Dense(8, use_bias=False), jax.random.normal(KEY, (64, 8))
    kernel = jnp.eye(8) * jnp.sqrt(start / jnp.var(x))
    params = {"params": {"kernel": kernel}}
    new = lsuv(module, x, params, tolerance=0.1)["params"]["kernel"]
    assert bool(jnp.any(new != kernel)) == moves


@pytest.mark.parametrize("api", ["linen", "nnx"])
def test_lsuv_scales_each_layer_of_a_scanned_stack(api):
    if api == "linen":
        module, held = Transformer(), Transformer().init(KEY, TEXT)
        held = lsuv(module, TEXT, held, tolerance=0.05)
    else:
        module, held = NnxTransformer(nnx.Rngs(0)), None
        assert lsuv(module, TEXT, tolerance=0.05) is None
    for layer, variance in variances(module, held, TEXT).items():
        if layer.startswith("blocks") and "norm" not in layer:
            assert variance == pytest.approx(1, abs=0.06), layer


def test_lsuv_keeps_dtypes():
    dtypes = {"param_dtype": jnp.bfloat16, "dtype": jnp.float32}
    model = nnx.Linear(8, 8, **dtypes, rngs=nnx.Rngs(0))
    lsuv(model, 50 * X)
    assert all(
        leaf.dtype == jnp.bfloat16 for _, leaf in _paths.leaves(nnx.state(model))
    )
    assert float(model(50 * X).var()) == pytest.approx(1, abs=0.1)


def shifted(params):
    """With a bias whose spread alone is too much."""
    first = params["params"]["first"]
    first["bias"] = first["bias"].at[3].set(-100.0)
    return params


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda p: lsuv(Linen(), X), ["lsuv: model", "Linen"]),
        (lambda p: lsuv(3, X, p), ["lsuv: model", "int"]),
        (lambda p: lsuv(Linen(), X, p, tolerance=0.0), ["lsuv: tolerance", "0.0"]),
        (lambda p: lsuv(Linen(), X, p, max_iterations=0), ["lsuv: max_iterations"]),
        (lambda p: lsuv(Linen(), 0 * X, p), ["lsuv: every layer", "'first'"]),
        (
            lambda p: lsuv(Linen(), X, shifted(p)),
            ["lsuv: max_iterations", "'first'", "10"],
        ),
        (
            lambda p: lsuv(nn.LayerNorm(), X, {"scale": jnp.ones(8), "bias": X[0]}),
            ["lsuv: the model must have a kernel", "scale"],
        ),
        (
            lambda p: signal_report(Linen(), None, X, mean_square),
            ["signal_report: model", "params=None"],
        ),
        (
            lambda p: signal_report(Linen(), p, X, lambda y: y),
            ["signal_report: loss", "(32, 3)"],
        ),
    ],
)
def test_bad_input(call, words, params):
    with pytest.raises(ValueError) as error:
        call(redraw(params, he_normal(), KEY))
    for word in words:
        assert word in str(error.value), error.value


def test_what_only_hands_out_its_parameters_is_no_layer():
    """The dense parts of this cell return their kernels, for one product of all."""
    cells, head = nn.RNN(nn.OptimizedLSTMCell(4)), nn.Dense(3)
    model, x = nn.Sequential([cells, head]), jnp.ones((2, 3, 4))
    params = model.init(jax.random.key(0), x)
    report = signal_report(model, params, x, mean_square)
    assert [row.layer for row in report.rows] == ["layers_1"]
    scaled = lsuv(model, x, params)
    kept = {str(path) for path, _ in _paths.leaves(params) if "layers_1" not in path}
    new = {str(path): leaf for path, leaf in _paths.leaves(scaled)}
    for path, leaf in _paths.leaves(params):
        assert (path in kept) == np.array_equal(leaf, new[path]) or path.endswith(
            "bias"
        )
