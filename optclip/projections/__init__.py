"""Projections: parameters that stay where they must.

    params + updates --landing--> what they would become --set--> nearest point
           --landing--> updates that `optax.apply_updates` turns into that point

One file a step:

    base            `Set`: nearest point, membership, memory; and over which axes
    boxes           every element on its own: intervals
    norms           the norms of units: measured, bounded from inside, given
    balls           norms that are bounded: `l2_ball`, Keras' `max_norm`
    spheres         norms that are fixed or kept in a range: Keras' other constraints
    sorted_sets     the l1 ball and the simplex, which sort
    spectral        singular values of matrices
    intersections   both of two sets
    landing         the arithmetic of `apply_updates`, predicted and steered
    places          which leaves, on which set
    closing         `project`, `project_params`, `clip_weights`: the doors
    qk_clip         heads whose attention logits grew too large

`optclip.sets` is the public name of the sets.
"""
