"""First values: presets for Flax, right on every layout, and a model drawn anew.

    presets ──▶ redraw(params_or_module, preset, key)      a model that exists
           └──▶ linen.layer(preset), nnx.layer(preset)     a layer that is being built

Presets of one law, presets that scale with the fans, whole-model presets; then gains,
the two doors, what a model's parameters are taken for, and its signal before training.
"""

# One law.
from optclip.initializers.isometries import dirac as dirac
from optclip.initializers.isometries import identity as identity
from optclip.initializers.distributions import normal as normal
from optclip.initializers.distributions import sparse as sparse
from optclip.initializers.distributions import truncated_normal as truncated_normal
from optclip.initializers.distributions import uniform as uniform
from optclip.initializers.distributions import zeros as zeros

# By the fans, and orthogonal.
from optclip.initializers.isometries import delta_orthogonal as delta_orthogonal
from optclip.initializers.scaling import he_normal as he_normal
from optclip.initializers.scaling import he_uniform as he_uniform
from optclip.initializers.scaling import lecun_normal as lecun_normal
from optclip.initializers.scaling import lecun_uniform as lecun_uniform
from optclip.initializers.isometries import orthogonal as orthogonal
from optclip.initializers.scaling import xavier_normal as xavier_normal
from optclip.initializers.scaling import xavier_uniform as xavier_uniform

# Whole models: a framework's defaults, a paper's recipe.
from optclip.initializers.recipes import dcgan as dcgan
from optclip.initializers.defaults import flax_default as flax_default
from optclip.initializers.recipes import gpt2 as gpt2
from optclip.initializers.defaults import keras_default as keras_default
from optclip.initializers.recipes import mup as mup
from optclip.initializers.recipes import ppo as ppo
from optclip.initializers.recipes import resnet as resnet
from optclip.initializers.defaults import torch_default as torch_default
from optclip.initializers.recipes import vit as vit
from optclip.initializers.recipes import zero_last as zero_last
from optclip.initializers.presets import Preset as Preset

# Gains, roles, and the two doors.
from optclip.initializers.gains import gain as gain
from optclip.initializers import linen as linen
from optclip.initializers import nnx as nnx
from optclip.initializers.parameter_info import Role as Role
from optclip.initializers.parameter_info import roles_of as roles_of
from optclip.initializers.redraw import redraw as redraw

# With a batch: unit variances, and the signal of every layer.
from optclip.initializers.signal_report import SignalReport as SignalReport
from optclip.initializers.signal_report import signal_report as signal_report
from optclip.initializers.lsuv import lsuv as lsuv
