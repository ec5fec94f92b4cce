"""Clipping: bounding updates.

The way through, one file a step, in the order that `engine.update` takes:

    groupings   of what        which elements are measured and clipped together
    measures    how big        the size of a group
    thresholds  how big may it be      the limit, from a constant to learned ones
    actions     to what size   what happens to a group over its limit
    blocks      leaves to blocks of groups, and back
    measuring   the size of every group, in one pass; `beside`: what else may be asked
    engine      `clip_by`: the way itself, and its state
    rules/      the named rules, a few lines each

Beside it: `skipping` (a guard around an optimizer), `values` (element clamping, which
needs no engine), `per_example` (sums for private training), `norms` (sizes on their
own), `metrics` (reading the numbers out of any optimizer state) and `resuming` (older
checkpoints).
"""
