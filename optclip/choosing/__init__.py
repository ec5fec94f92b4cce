"""Choosing a rule and its value from sizes that were logged: replay, advice, logs."""
