"""What spike_clip promises, measured, and what the committed table says of others."""

import numpy as np
import pytest

from benchmarks import spikes


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


def test_readme_has_the_committed_table():
    assert spikes.table(spikes.load()) in spikes.README.read_text()
