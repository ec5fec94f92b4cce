"""A bar from the start: races done, what is compiled or timed, and the time left.

Races differ a hundredfold in length, so the bar counts guesses of seconds; what is left
of them is scaled by how long those so far really took.
"""

import contextlib
from collections.abc import Iterator

from tqdm import tqdm

from benchmarks.contexts import Entry

FORMAT = "{percentage:3.0f}%|{bar:12}| {elapsed}, {remaining} left; {desc}"


class Progress:
    """The bar of some races that are guessed to take so many seconds together."""

    def __init__(self, races: int, seconds: float) -> None:
        self.races, self.begun, self.name, self.planned = races, 0, "", 0.0
        self.bar = tqdm(
            total=seconds,
            bar_format=FORMAT,
            smoothing=0,  # the mean speed, because kinds of races differ
            dynamic_ncols=True,
        )

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *exception: object) -> None:
        self.bar.close()

    @contextlib.contextmanager
    def race(self, entry: Entry) -> Iterator[None]:
        """While it lasts, the bar names it; then it counts as done, whoever ran."""
        self.begun += 1
        self.name = " ".join(value for value in entry.about.values() if value != "-")
        self.planned += entry.seconds
        self.says("drawing arrays")
        yield
        self.passes(self.planned - self.bar.n)

    def says(self, doing: str) -> None:
        """What happens from now on."""
        self.bar.set_description_str(
            f"race {self.begun} of {self.races}, {self.name}: {doing}"
        )

    def passes(self, seconds: float) -> None:
        """What was guessed to take so many seconds is done."""
        self.bar.update(seconds)
