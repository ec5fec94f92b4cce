"""What spike_clip promises, measured, and what the committed table says of others."""

import numpy as np
import pytest

from benchmarks import spikes

pytestmark = pytest.mark.ordinary  # they compute for longer


@pytest.mark.parametrize("sigma", spikes.NOISES)
def test_spike_clip_keeps_every_bound(sigma: float):
    columns = spikes.respond(spikes.RULES["spike_clip"], sigma)
    assert spikes.broken(columns, sigma) == []
    recorded = spikes.load()["spike_clip"][sigma]
    for name, seeds in columns.items():
        np.testing.assert_allclose(np.median(seeds), np.median(recorded[name]), 0.02)


def test_no_other_rule_keeps_every_bound():
    responses = spikes.load()
    assert list(responses) == list(spikes.RULES)
    for rule, by_noise in responses.items():
        kept = all(not spikes.broken(columns, s) for s, columns in by_noise.items())
        assert kept == (rule == "spike_clip"), rule


RESCALING = ["spike_clip", "zclip", "autoclip", "second_moment_clip, θ = 9"]


@pytest.mark.parametrize("rule", RESCALING)
def test_the_limit_that_is_drawn_is_what_the_rule_keeps(rule: str):
    tx, norms = spikes.RULES[rule], spikes.noise(7, 150, 0.1)[:, :1]
    norms[100] = 30.0
    passed = spikes.play(tx, norms).passed[:, 0]
    limit = np.asarray(spikes.limits(tx, norms[:, 0].astype(np.float32)))
    np.testing.assert_allclose(np.minimum(norms[:, 0], limit), passed, rtol=1e-5)
    assert passed[100] < 10


def test_the_table_has_a_row_for_each_rule():
    rows = spikes.table(spikes.load()).splitlines()
    assert [row.split(" |")[0] for row in rows[2:]] == [f"| {x}" for x in spikes.RULES]
    width = {row.count("|") for row in rows}
    assert len(width) == 1
