"""The named rules, one file a paper: the threshold and the rule that is made of it.

`norms` has those with a given limit on a norm. `values`, `per_example` and `skip_step`
are no rules of `clip_by`: they clamp elements, sum examples, and wrap an optimizer.
"""
