"""Every example runs as a user runs it, prints finite numbers and draws its picture."""

import json
import math
import pathlib
import subprocess
import sys
from collections.abc import Callable

import pytest

from tests import compiling

EXAMPLES = pathlib.Path(__file__).parents[2] / "examples"
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module")
def run() -> Callable[..., list[str]]:
    """The lines that an example prints; warnings are errors there too.

    Most of them compile for much longer than their few steps take.
    """

    def lines(example: str, *options: str, level: int = 0) -> list[str]:
        command = [sys.executable, "-W", "error", str(EXAMPLES / example), *options]
        variables = compiling.environment(level)
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, env=variables
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    return lines


@pytest.fixture(scope="module")
def regression(run, tmp_path_factory):
    """A short run of the main job: its lines and its folder."""
    output = tmp_path_factory.mktemp("regression")
    return run("regression.py", "--epochs", "10", "--output", str(output)), output


@pytest.fixture(scope="module")
def spikes(run, tmp_path_factory):
    """A short run of the corrupted batches: its lines and its folder."""
    output = tmp_path_factory.mktemp("spikes")
    options = "--steps", "30", "--batch", "4", "--output", str(output)
    return run("transformer_spikes.py", *options), output


@pytest.fixture(scope="module")
def deep_init(run, tmp_path_factory):
    """A short run of a less deep network: its lines and its folder."""
    output = tmp_path_factory.mktemp("deep_init")
    options = "--depth", "6", "--steps", "60", "--output", str(output)
    return run("deep_init.py", *options), output


@pytest.fixture(scope="module")
def transfer(run, tmp_path_factory):
    """A short run of every rate at two widths: its lines and its folder."""
    output = tmp_path_factory.mktemp("transfer")
    options = "--quick", "--steps", "10", "--seeds", "1", "--output", str(output)
    return run("hyperball_transfer.py", *options), output


@pytest.fixture(scope="module")
def rnn(run, tmp_path_factory):
    """The vanilla RNN alone, whose many short steps are most of its time."""
    output = tmp_path_factory.mktemp("rnn")
    options = "--quick", "--output", str(output)
    return run("rnn_exploding.py", *options, level=1), output


@pytest.fixture(scope="module")
def wgan(run, tmp_path_factory):
    """A short run of the three critics: its lines and its folder."""
    output = tmp_path_factory.mktemp("wgan")
    return run("wgan_digits.py", "--steps", "20", "--output", str(output)), output


def rows(lines: list[str], of: str = "rule", width: int = 32) -> dict[str, str]:
    """The table's rows by name: what stands between its header and the empty line."""
    (header,) = (n for n, line in enumerate(lines) if line.startswith(f"{of} "))
    table = lines[header + 1 : lines.index("", header)]
    return {line[:width].strip(): line[width:] for line in table}


def test_every_example_is_tested():
    tested = {
        "deep_init.py",
        "hyperball_transfer.py",
        "multihost.py",  # in a file of its own
        "regression.py",
        "rnn_exploding.py",
        "transformer_spikes.py",
        "wgan_digits.py",
    }
    assert {path.name for path in EXAMPLES.glob("*.py")} == tested


def test_the_run_is_given_advice(regression):
    lines, _ = regression
    (advice,) = (line for line in lines if line.startswith("The norms under"))
    assert "diverges from the start" in advice and "Use a fixed limit" in advice


def test_the_smallest_program_prints_what_the_clip_saw(regression):
    lines, _ = regression
    printed = dict(line.split() for line in lines if line.startswith("0/"))
    assert float(printed["0/steps"]) == 5
    assert 0 < float(printed["0/clipped_steps"]) < 5
    assert float(printed["0/limit"]) == 1


def test_without_a_clip_the_run_diverges_and_the_table_says_so(regression):
    lines, _ = regression
    assert "diverged at epoch 1" in rows(lines)["none"]


def test_every_fixed_limit_learns_and_its_row_is_finite(regression):
    lines, _ = regression
    fixed = {name: row for name, row in rows(lines).items() if name.startswith("clip_")}
    assert len(fixed) == 6
    for name, row in fixed.items():
        numbers = [float(word.rstrip("%")) for word in row.split()]
        assert len(numbers) == 5, name
        assert all(math.isfinite(number) for number in numbers), name
        train_mse, _, share, norm, _ = numbers
        assert 0 < train_mse < 15_000, name  # before the first step: 20,000
        assert 0 < share <= 100 and norm > 0, name


def test_the_other_rules_have_a_row_each(regression):
    # Where the usual norm is the problem, rules that learn it may diverge: no bound.
    lines, _ = regression
    others = [name for name in rows(lines) if not name.startswith("clip_")]
    assert len(others) == 9 and "none" in others


def test_without_a_clip_every_corrupted_batch_passes_and_nan_ends_the_run(spikes):
    lines, _ = spikes
    row = rows(lines)["none"]
    assert "NaN from step 27 on" in row
    *_, acted_on, let_through, _ = row.split()
    assert acted_on == "0.0%" and float(let_through) > 100


def test_every_rule_survives_the_corrupted_batches(spikes):
    lines, _ = spikes
    kept = {name: row for name, row in rows(lines).items() if name != "none"}
    assert len(kept) == 6
    for name, row in kept.items():
        numbers = [float(word.rstrip("%")) for word in row.split()]
        assert len(numbers) == 5, name
        assert all(math.isfinite(number) for number in numbers), name
        train_loss, validation, acted_on, _, _ = numbers
        # Uniform bytes: 4.85. ZClip learns its limit from the first corrupted batch.
        assert name == "zclip" or max(train_loss, validation) < 4.85, name
        assert 0 < acted_on <= 100, name


@pytest.mark.parametrize(
    ("rule", "most"), [("clip_by_global_norm(1)", 1), ("adagc", 1), ("skip_step", 10)]
)
def test_no_large_corrupted_batch_reaches_the_optimizer(spikes, rule, most):
    lines, _ = spikes
    assert float(rows(lines)[rule].split()[3]) <= most


def test_what_did_worse_than_the_fixed_norm_is_said(spikes):
    lines, _ = spikes
    (worse,) = (line for line in lines if line.startswith("worse than "))
    assert "none (+nan)" in worse


def test_the_signal_keeps_its_size_or_halves_and_zeros_stay_equal(deep_init):
    lines, _ = deep_init
    table = {}
    for name, row in rows(lines, of="start", width=24).items():
        *numbers, accuracy, units, _ = row.split()
        table[name] = [float(number) for number in numbers], accuracy, int(units)
        assert all(math.isfinite(number) for number in table[name][0]), name
    assert len(table) == 7
    signal = {name: numbers[0] for name, (numbers, *_) in table.items()}
    assert 0.1 < signal["He, ReLU"] < 10 and 0.9 < signal["LSUV, ReLU"] < 1.1
    # Each ReLU halves its square.
    assert signal["Xavier, ReLU"] ** 2 < 0.1 * signal["He, ReLU"] ** 2
    loss = {name: numbers[2] for name, (numbers, *_) in table.items()}
    assert loss["He, ReLU"] < loss["Xavier, ReLU"] < 2.31
    assert loss["Xavier, 2 layers"] < 2 < loss["zeros, 2 layers"]
    units = {name: units for name, (_, _, units) in table.items()}
    assert units["zeros, 2 layers"] == 1 and units["Xavier, 2 layers"] == 64


def test_only_a_small_enough_limit_trains_the_rnn(rnn):
    lines, _ = rnn
    table = rows(lines, of="vanilla RNN", width=24)
    assert len(table) == 8
    errors, solved = {}, {}
    for name, row in table.items():
        *_, loss, error, count, _, seeds = row.split()
        assert math.isfinite(float(loss)) and seeds == "2", name
        errors[name], solved[name] = float(error.rstrip("%")), int(count)
    assert solved["no clip"] == solved["spike_clip"] == 0
    assert errors["no clip"] > 60  # chance: 75
    # Either may lose a seed: what is rounded otherwise ends elsewhere.
    assert solved["norm, best of sweep"] + solved["clip_cotangent"] >= 2
    for name in ("norm, best of sweep", "clip_cotangent"):
        assert errors[name] < errors["no clip"] - 20
    (told,) = (line for line in lines if line.startswith("vanilla RNN: "))
    assert "none: no clip" in told


def test_the_rnn_finds_its_limit(rnn):
    lines, _ = rnn
    (advice,) = (line for line in lines if line.startswith("The norms of one"))
    assert "clips" in advice
    (header,) = (n for n, line in enumerate(lines) if line.startswith("   limit"))
    sweep = [line.split() for line in lines[header + 1 : lines.index("", header)]]
    assert len(sweep) == 6
    limits, losses = ([float(row[i]) for row in sweep] for i in (0, 1))
    best = limits[losses.index(min(losses))]
    row = rows(lines, of="vanilla RNN", width=24)["norm, best of sweep"]
    assert row.split()[0] == f"{best:.2g}"


def test_limits_are_swept(regression):
    lines, _ = regression
    table = rows(lines, of="   limit", width=8)
    rates = [float(row.split()[1]) for row in table.values()]
    assert len(table) == 10 and rates == sorted(rates, reverse=True)
    assert rates[0] == 100 and table["inf"].split()[0] in ("nan", "inf")
    (best,) = (line for line in lines if line.startswith("clip_by_global_norm, all"))
    assert best.rstrip(":").split()[-1] in table


def test_critics_keep_their_bounds(wgan):
    lines, _ = wgan
    (header,) = (n for n, line in enumerate(lines) if line.startswith("critic "))
    table = lines[header + 1 : lines.index("", header)]
    assert [line[:20].strip() for line in table] == [
        "clip_weights(0.01)",
        "spectral_ball(1)",
        "no bound",
    ]
    numbers = [[float(word) for word in line[20:].split()] for line in table]
    assert all(math.isfinite(number) for row in numbers for number in row)
    (_, slope, largest, *_), (_, spectral_slope, *_), (_, free_slope, *_) = numbers
    assert largest <= 0.01 and slope < 1.5
    assert spectral_slope <= 1.01 < free_slope


def test_what_transfers_is_reported_and_saved(transfer):
    lines, output = transfer
    numbers = json.loads((output / "hyperball_transfer.json").read_text())
    assert numbers["settings"] == {"steps": 10, "seeds": 1, "widths": [8, 16]}
    assert len(numbers["runs"]) == 12
    for run_ in numbers["runs"]:
        assert math.isfinite(run_["validation"]) and run_["validation"] < 6
        kept = abs(run_["norm"] - 1) < 1e-6
        assert kept == (run_["method"] == "hyperball"), run_
    for method in ("adamw", "hyperball"):
        (line,) = (line for line in lines if line.startswith(f"{method}: best rate"))
        assert "the narrow one's costs" in line and "at 16" in line
    assert lines[-1].endswith(str(output / "hyperball_transfer.png"))
    assert (output / "hyperball_transfer.png").read_bytes().startswith(PNG)


@pytest.mark.parametrize(
    "example", ["regression", "spikes", "deep_init", "rnn", "wgan"]
)
def test_the_last_line_names_the_picture(example, request):
    lines, output = request.getfixturevalue(example)
    (picture,) = output.iterdir()
    assert lines[-1].endswith(str(picture))
    assert picture.read_bytes().startswith(PNG)
