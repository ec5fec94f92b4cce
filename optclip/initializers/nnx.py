"""For NNX layers that are being built: `layer`, the initializers as keywords."""

from optclip.initializers.layer import layer

__all__ = ["layer"]
