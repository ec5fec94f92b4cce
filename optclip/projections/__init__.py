"""Projections: parameters that stay where they must.

    params + updates --landing--> what they would become --set--> nearest point
           --landing--> updates that `optax.apply_updates` turns into that point

One file a step:

    base            `Set`: nearest point, membership, memory; and over which axes
    boxes           every element on its own: intervals
    balls           norms of leaves or units: balls, spheres, Keras' constraints
    sorted_sets     the l1 ball and the simplex, which sort
    spectral        singular values of matrices
    intersections   both of two sets
    landing         the arithmetic of `apply_updates`, predicted and steered
    closing         `project`, `project_params`, `clip_weights`: the doors
    qk_clip         heads whose attention logits grew too large

`optclip.sets` is the public name of the sets.
"""
