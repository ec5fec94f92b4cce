"""Draws with PyTorch's layers and `torch.nn.init` into `torch_initializers.json`.

Run as `python tests/golden/make_torch_initializers.py`, in an environment with torch
and NumPy. What is kept of a draw is its law: mean, deviation, largest magnitude and
deciles, with the parameter's path and the shapes of its kin as Flax has them.
"""

import numpy as np
import torch
from inputs import draw, write
from torch import nn

_WIDE = {"fc/kernel": (128, 256), "fc/bias": (256,)}
_CONV = {"c/kernel": (3, 3, 32, 64), "c/bias": (64,)}
_WITHOUT_FANS = ("normal", "truncated_normal")
_GAINS = ["linear", "sigmoid", "tanh", "relu", "selu", "leaky_relu"]


def _default(name: str, drawn, path: str, shapes: dict, **extra) -> dict:
    return draw(
        name, "torch_default", {}, drawn.detach().numpy(), path, shapes, **extra
    )


def _layers() -> list[dict]:
    """The layers as PyTorch builds them."""
    grouped = {"c/kernel": (3, 3, 8, 64), "c/bias": (64,)}
    depthwise = {"c/kernel": (3, 3, 1, 1024), "c/bias": (1024,)}
    conv1d = {"c/kernel": (5, 32, 64), "c/bias": (64,)}
    up = {"ConvTranspose_0/kernel": (3, 3, 32, 64), "ConvTranspose_0/bias": (64,)}
    fused = {"dense_i/kernel": (64, 512), "dense_h/kernel": (128, 512)}
    fused |= {"dense_h/bias": (512,)}
    gru = {"dense_i/kernel": (64, 384), "dense_i/bias": (384,)}
    gru |= {"dense_h/kernel": (128, 384)}
    heads = {f"a/{n}/kernel": (256, 8, 32) for n in ("query", "key", "value")}
    heads |= {f"a/{n}/bias": (8, 32) for n in ("query", "key", "value")}
    heads |= {"a/out/kernel": (8, 32, 256), "a/out/bias": (256,)}
    qkv = {"a/qkv/kernel": (256, 3, 8, 32), "a/qkv/bias": (3, 8, 32)}
    cases = []
    for name, layer, shapes in [
        ("Linear", nn.Linear(128, 256), _WIDE),
        ("Conv2d", nn.Conv2d(32, 64, 3), _CONV),
        ("Conv2d groups=4", nn.Conv2d(32, 64, 3, groups=4), grouped),
        ("Conv2d depthwise", nn.Conv2d(1024, 1024, 3, groups=1024), depthwise),
        ("Conv1d", nn.Conv1d(32, 64, 5), conv1d),
    ]:
        kernel, bias = shapes
        cases.append(_default(f"{name}.weight", layer.weight, kernel, shapes))
        cases.append(_default(f"{name}.bias", layer.bias, bias, shapes))
    layer, layouts = nn.ConvTranspose2d(32, 64, 3), {"ConvTranspose_0/kernel": "w*oi"}
    for path, values in zip(up, (layer.weight, layer.bias), strict=True):
        cases.append(
            _default(f"ConvTranspose2d {path}", values, path, up, layouts=layouts)
        )
    embedding = {"e/embedding": (1000, 64)}
    cases.append(
        _default("Embedding", nn.Embedding(1000, 64).weight, *embedding, embedding)
    )
    for name, cell, shapes in [
        ("LSTM", nn.LSTM(64, 128), fused),
        ("GRU", nn.GRU(64, 128), gru),
    ]:
        bias = next(path for path in shapes if path.endswith("bias"))
        for values, path in [
            (cell.weight_ih_l0, "dense_i/kernel"),
            (cell.weight_hh_l0, "dense_h/kernel"),
            (cell.bias_hh_l0, bias),
        ]:
            cases.append(_default(f"{name} {path}", values, path, shapes))
    attention = nn.MultiheadAttention(256, 8)
    rows = attention.in_proj_weight
    cases += [
        _default("MultiheadAttention query", rows[:256], "a/query/kernel", heads),
        _default("MultiheadAttention key", rows[256:512], "a/key/kernel", heads),
        _default("MultiheadAttention value", rows[512:], "a/value/kernel", heads),
        _default("MultiheadAttention in_proj", rows, "a/qkv/kernel", qkv),
        _default(
            "MultiheadAttention out", attention.out_proj.weight, "a/out/kernel", heads
        ),
    ]
    for values, path in [
        (attention.in_proj_bias[:256], "a/query/bias"),
        (attention.out_proj.bias, "a/out/bias"),
    ]:
        cases.append(_default(f"MultiheadAttention {path}", values, path, heads))
    norm = {"n/scale": (256,), "n/bias": (256,)}
    for path, values in zip(norm, nn.BatchNorm2d(256).parameters(), strict=True):
        cases.append(_default(f"BatchNorm2d {path}", values, path, norm))
    return cases


def _functions() -> list[dict]:
    """`torch.nn.init` on a Linear's and a Conv2d's weight."""
    init, gain = nn.init, nn.init.calculate_gain("tanh")
    dense, conv = (256, 128), (64, 32, 3, 3)  # PyTorch's order
    cases = []
    for name, fill, arguments in [
        ("xavier_uniform", init.xavier_uniform_, {}),
        ("xavier_uniform", lambda w: init.xavier_uniform_(w, gain), {"gain": gain}),
        ("xavier_normal", init.xavier_normal_, {}),
        ("he_uniform", init.kaiming_uniform_, {"a": 0.0}),
        ("he_uniform", lambda w: init.kaiming_uniform_(w, 5**0.5), {"a": 5**0.5}),
        ("he_normal", lambda w: init.kaiming_normal_(w, nonlinearity="relu"), {}),
        (
            "he_normal",
            lambda w: init.kaiming_normal_(w, mode="fan_out", nonlinearity="tanh"),
            {"activation": "tanh", "mode": "fan_out"},
        ),
        ("orthogonal", init.orthogonal_, {}),
        ("orthogonal", lambda w: init.orthogonal_(w, 2.0), {"gain": 2.0}),
        ("normal", lambda w: init.normal_(w, std=0.02), {"stddev": 0.02}),
        # Cut at two deviations, as the argument is in PyTorch's units.
        (
            "truncated_normal",
            lambda w: init.trunc_normal_(w, std=0.02, a=-0.04, b=0.04),
            {"stddev": 0.02, "corrected": False},
        ),
    ]:
        for shape, path, shapes in [
            (dense, "fc/kernel", _WIDE),
            (conv, "c/kernel", _CONV),
        ][: 1 if name in _WITHOUT_FANS else 2]:
            values = fill(torch.empty(shape)).numpy()
            words = " ".join(f"{k}={v}" for k, v in arguments.items())
            label = f"{name} {words} {path}"
            cases.append(draw(label, name, arguments, values, path, shapes))
    sparse = init.sparse_(torch.empty(256, 128), 0.75, std=0.1).numpy()
    arguments = {"sparsity": 0.75, "stddev": 0.1}
    cases.append(draw("sparse", "sparse", arguments, sparse, "fc/kernel", _WIDE))
    eye = init.eye_(torch.empty(256, 128)).numpy()
    cases.append(draw("eye", "identity", {}, eye, "fc/kernel", _WIDE))
    for groups, layouts in [(1, {}), (4, {"c/kernel": "w*io/4"})]:
        weight = init.dirac_(torch.empty(64, 32 // groups, 3, 3), groups).numpy()
        shapes = {"c/kernel": (3, 3, 32 // groups, 64), "c/bias": (64,)}
        label = f"dirac groups={groups}"
        exact = weight.transpose(2, 3, 1, 0)
        ones = np.argwhere(exact == 1).tolist()
        cases.append(
            draw(label, "dirac", {}, weight, "c/kernel", shapes,
                 layouts=layouts, ones=ones)
        )  # fmt: skip
    return cases


def main() -> None:
    torch.manual_seed(0)
    gains = {name: float(nn.init.calculate_gain(name)) for name in _GAINS}
    gains["leaky_relu 0.2"] = float(nn.init.calculate_gain("leaky_relu", 0.2))
    versions = {"torch": torch.__version__, "numpy": np.__version__}
    write(__file__, versions, [*_layers(), *_functions()], gains=gains)


if __name__ == "__main__":
    main()
