"""The pages to start with. The build of the documentation executes every page."""

import pytest

from tests import pages

PAGES = [
    "start/nnx",
    "start/linen",
    "start/equinox",
    "start/haiku",
    "start/plain",
]

pytestmark = pytest.mark.usefixtures("as_a_reader_has_it")


@pytest.mark.parametrize("name", PAGES)
def test_runs_from_top_to_bottom(name):
    if name == "start/haiku":
        pytest.importorskip("haiku")
    printed = "".join(text for _, text in pages.execute(f"docs/{name}.md"))
    # The spoiled batch is seen, and one of those clipped.
    line = next(x for x in printed.splitlines() if x.startswith("step 150"))
    norm, limit = (float(line.split(word)[1].split()[0]) for word in ("norm", "limit"))
    assert norm > 100 * limit
    last = next(x for x in printed.splitlines() if x.startswith("step 300"))
    assert float(last.split("loss")[1].split()[0]) < 0.1
