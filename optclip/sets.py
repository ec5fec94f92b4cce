"""Where parameters must stay: the sets for `project` and `project_params`."""

from optclip.projections.balls import l2_ball as l2_ball
from optclip.projections.balls import max_norm as max_norm
from optclip.projections.base import Set as Set
from optclip.projections.boxes import box as box
from optclip.projections.boxes import init_box as init_box
from optclip.projections.boxes import linf_ball as linf_ball
from optclip.projections.boxes import nonnegative as nonnegative
from optclip.projections.intersections import intersection as intersection
from optclip.projections.sorted_sets import l1_ball as l1_ball
from optclip.projections.sorted_sets import simplex as simplex
from optclip.projections.spectral import orthogonal as orthogonal
from optclip.projections.spectral import spectral_ball as spectral_ball
from optclip.projections.spheres import norm_range as norm_range
from optclip.projections.spheres import norm_sphere as norm_sphere
from optclip.projections.spheres import unit_norm as unit_norm
