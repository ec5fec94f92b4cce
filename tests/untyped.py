"""A value whose type the checker is not to know."""

from typing import Any


def untyped(value: object) -> Any:
    """The value itself.

    For states and updates of transformations: Optax types them as any tree at all, in
    which no field can be read, and None, which every rule here takes, is no state. And
    for arguments that are wrong on purpose.
    """
    return value
