"""The loops of docs/migration give what the libraries' loops on the same page gave.

`tests/golden/make_migration.py` ran the other libraries' blocks, as the pages have
them, and kept their losses and norms; none of these libraries is needed here.
"""

import json
import re

import numpy as np
import pytest

from tests import pages

RECORDED = json.loads((pages.ROOT / "tests/golden/migration.json").read_text())
BLOCK = re.compile(r"```python\n(.*?)```", re.DOTALL)
# Losses of up to 2e5 pass through 20 steps of an optimizer, each a few roundings apart.
RTOL = 2e-4

pytestmark = pytest.mark.usefixtures("as_a_reader_has_it")


@pytest.mark.parametrize("name", RECORDED)
def test_gives_the_recorded_losses_and_norms(name):
    loops = iter(RECORDED[name]["loops"])
    for namespace, _ in pages.execute(f"docs/migration/{name}.md"):
        values = {k: namespace.pop(k) for k in ("losses", "norms") if k in namespace}
        want = next(loops) if values else {}
        for kind, found in values.items():
            got = np.asarray(found, np.float64)
            np.testing.assert_allclose(got, want[kind], rtol=RTOL, err_msg=kind)
    assert next(loops, None) is None, "a recorded loop has no counterpart"


@pytest.mark.parametrize("name", RECORDED)
def test_what_was_recorded_is_what_the_page_shows(name):
    text = (pages.ROOT / f"docs/migration/{name}.md").read_text()
    shown = [block for block in BLOCK.findall(text) if "losses" in block]
    assert shown == [loop["program"] for loop in RECORDED[name]["loops"]]


def test_the_clips_of_the_loops_matter():
    """Each recorded loop has norms above its limit, so that the comparison can fail."""
    for page in RECORDED.values():
        for loop in page["loops"]:
            assert not loop["norms"] or max(loop["norms"]) > 10
