"""Initialization: presets for Flax, right on every layout, and drawing a model anew.

    presets ──▶ redraw(params_or_module, preset, key)      a model that exists
           └──▶ linen.layer(preset), nnx.layer(preset)     a layer that is being built

A preset is a JAX initializer too: `kernel_init=he_normal()`. The third column is the
file: presets share a file by family.

| preset | draws | file |
|---|---|---|
| `zeros()` | all 0 | distributions |
| `normal(stddev)` | normal | distributions |
| `truncated_normal(stddev)` | normal, within two deviations | distributions |
| `uniform(scale)` | uniform, from 0 up to a scale | distributions |
| `sparse(sparsity)` | normal, most inputs of an output 0 | distributions |
| `he_normal()`, `he_uniform()` | variance gain² / fan_in | he |
| `xavier_normal()`, `xavier_uniform()` | variance 2 / (fan_in + fan_out) | xavier |
| `lecun_normal()`, `lecun_uniform()` | variance 1 / fan_in | lecun |
| `orthogonal()` | orthonormal columns or rows | orthogonal |
| `delta_orthogonal()` | convolutions, orthogonal at each pixel | orthogonal |
| `identity()`, `dirac()` | layers that return their inputs | orthogonal |
| `flax_default()` | what Flax draws | framework_defaults |
| `keras_default()` | what Keras draws | framework_defaults |
| `torch_default()` | what PyTorch draws | framework_defaults |
| `gpt2(num_layers)` | normal, with small residual projections | recipes |
| `vit()` | the vision transformer's | recipes |
| `resnet(zero_init_last)` | torchvision's residual network's | recipes |
| `dcgan()` | the convolutional GAN's | recipes |
| `ppo()` | orthogonal, with a small policy head | recipes |
| `mup(base_width)` | maximal update parametrization | recipes |
| `zero_last(preset)` | heads and ends of residual branches at 0 | recipes |

| name | what it is | file |
|---|---|---|
| `Preset` | role → initializer | presets |
| `redraw` | draws every parameter of a model anew, by its role | redraw |
| `roles_of`, `Role` | the role and fans that `redraw` finds for parameters | roles_of |
| `linen.layer`, `nnx.layer` | a layer's initializers as keywords | layer |
| `gain` | the factor that undoes an activation | he |
| `lsuv` | scales kernels until outputs have unit variance | lsuv |
| `signal_report`, `SignalReport` | each layer's signal | signal_report |

What roles there are, and how they are found: `roles`. How a parameter of any layout is
drawn: `kernel_shapes`. To add a preset: write it in the file of its family, and add it
here.
"""

from optclip.initializers import linen, nnx
from optclip.initializers.distributions import (
    normal,
    sparse,
    truncated_normal,
    uniform,
    zeros,
)
from optclip.initializers.framework_defaults import (
    flax_default,
    keras_default,
    torch_default,
)
from optclip.initializers.he import gain, he_normal, he_uniform
from optclip.initializers.lecun import lecun_normal, lecun_uniform
from optclip.initializers.lsuv import lsuv
from optclip.initializers.orthogonal import (
    delta_orthogonal,
    dirac,
    identity,
    orthogonal,
)
from optclip.initializers.presets import Preset
from optclip.initializers.recipes import dcgan, gpt2, mup, ppo, resnet, vit, zero_last
from optclip.initializers.redraw import redraw
from optclip.initializers.roles_of import Role, roles_of
from optclip.initializers.signal_report import SignalReport, signal_report
from optclip.initializers.xavier import xavier_normal, xavier_uniform

__all__ = [
    "Preset", "Role", "SignalReport", "dcgan", "delta_orthogonal", "dirac",
    "flax_default", "gain", "gpt2", "he_normal", "he_uniform", "identity",
    "keras_default", "lecun_normal", "lecun_uniform", "linen", "lsuv", "mup", "nnx",
    "normal", "orthogonal", "ppo", "redraw", "resnet", "roles_of", "signal_report",
    "sparse", "torch_default", "truncated_normal", "uniform", "vit", "xavier_normal",
    "xavier_uniform", "zero_last", "zeros",
]  # fmt: skip


def __dir__() -> list[str]:
    """What completion offers: no files."""
    return __all__
