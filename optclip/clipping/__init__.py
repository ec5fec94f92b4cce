"""Clipping: bounding updates.

    clip_by         a rule from a threshold, a measure, a grouping and an action
    engine          the way of the updates through these parts, top to bottom
    thresholds      what a threshold is, and limits that are given
    actions         to what size a group is scaled
    other_sizes     what a threshold may ask for beside sizes: of the parameters, of all
    state_blocks    a threshold's state, as it is kept and block by block
    recorder        the sizes of the last steps, which `record=K` keeps
    state_choice    an optimizer's step or none, for `skip_step`
    clip_cotangent  an identity whose backward pass is clipped
    rules/          the named rules, one file a paper, each with its threshold

Measures, groupings and the sizes of groups are in `_core`, on which projections stand
too.
"""
