"""Reading numbers and states: metrics, norms on their own, and older checkpoints."""
