"""To what size: what happens to a group, given its size and its limit.

| action | target size |
|---|---|
| `rescale()` | min(size, limit) (default) |
| `rescale(div_eps)` | size · min(1, limit / (size + div_eps)), PyTorch's |
| `smooth()` | size / (1 + size / limit) |
| `normalize()` | limit: every group has it afterwards |
| `floor()` | max(size, limit): what is too small is raised |

`Action` makes one of your own.
"""

from optclip.clipping.actions import Action, floor, normalize, rescale, smooth

__all__ = ["Action", "floor", "normalize", "rescale", "smooth"]
