"""Projections: parameters that stay in a set.

    params + updates --landing--> what they would become --set--> nearest point
           --landing--> updates that `optax.apply_updates` turns into that point

Where to look:

    base              `Set`: what a set is made of, and over which axes it extends
    boxes             every element on its own: intervals
    norms             Euclidean norms of units: balls and spheres
    norm_range        the same, in a range
    norm_arithmetic   how those norms are measured and given, over all of the range
    sorted_sets       the l1 ball and the simplex, which sort
    matrices          sets of matrices by their singular values
    polar             the same by products of matrices (Newton-Schulz)
    init_sphere       spheres of the norms that leaves started with
    radii             a radius: a number, one a point, or a tree of them
    intersection      the points of two sets that lie in both
    landing           the arithmetic of `apply_updates`, predicted and steered
    project           `project`: which leaves on which set, at every step
    clip_weights      WGAN's weight clipping
    project_params    parameters projected at once, outside of a chain
    qk_clip           attention heads whose logits grew too large
    record_max_logits the largest logits, which `qk_clip` needs

`optclip.sets` is the public name of the sets. Nothing here imports from `clipping`.
"""
