"""The named rules: each a docstring and a few lines over one threshold."""
