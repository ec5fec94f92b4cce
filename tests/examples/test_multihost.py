"""The example of several processes: killed, resumed, moved, and joined in a cluster."""

import os
import pathlib
import re
import socket
import subprocess
import sys

import pytest

from tests import compiling

EXAMPLE = pathlib.Path(__file__).parents[2] / "examples" / "multihost.py"
# What JAX looks at for a cluster, which these tests may run in.
CLUSTER = re.compile(r"SLURM_|OMPI_|KUBERNETES_|JAX_(COORDINATOR|NUM_PROC|PROCESS)")


def start(surroundings, *options: str, **variables: str) -> subprocess.Popen:
    """The example where JAX sees no other cluster than these variables make."""
    kept = {k: v for k, v in surroundings.items() if not CLUSTER.match(k)}
    return subprocess.Popen(
        [sys.executable, "-W", "error", str(EXAMPLE), *options],
        env=kept | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def printed(process: subprocess.Popen) -> str:
    out, errors = process.communicate()
    assert process.returncode == 0, errors
    return out


@pytest.fixture(scope="module")
def shown(tmp_path_factory) -> str:
    """What the program prints on one machine; its processes compile one step each."""
    output = str(tmp_path_factory.mktemp("multihost"))
    return printed(start(compiling.environment(), "--output", output))


def row(shown: str, step: int) -> list[str]:
    """Both processes' norms, the limit, the loss, that of one device, the note."""
    (found,) = re.findall(rf"^ *{step} {{2}}(.*)$", shown, re.M)
    return found.split(maxsplit=5)


def test_both_processes_see_the_same_norm(shown):
    assert "Equal norms in both processes: 40 of 40 steps." in shown
    for step in (1, 12, 18, 20, 26, 33, 40):
        first, second, *_ = row(shown, step)
        assert first == second


def test_a_nan_in_the_rows_of_one_process_is_dropped_by_all(shown):
    first, second, limit, loss, alone, note = row(shown, 12)
    assert {first, second, loss, alone} == {"nan"} and float(limit) > 0
    assert "drops" in note
    assert float(row(shown, 18)[4]) > 0  # and none of it is left


@pytest.mark.parametrize("step", [18, 33])
def test_spikes_are_far_over_the_limit_and_do_no_harm(shown, step):
    norm, _, limit, loss, *_ = row(shown, step)
    assert float(norm) > 100 * float(limit) and float(loss) > 1e5
    assert float(row(shown, 60)[3]) < float(row(shown, 1)[3])


@pytest.mark.parametrize("devices", ["two processes", "six devices"])
def test_losses_are_those_of_one_device(shown, devices):
    (found,) = re.findall(rf"Losses of {devices}: within (\S+) of", shown)
    assert float(found) < 1e-5


def test_the_killed_run_goes_on_bit_for_bit(shown):
    assert "Steps repeated after the kill: 6 of 6 bit for bit." in shown


@pytest.mark.parametrize("step", [20, 40])
def test_what_was_learned_is_restored_bit_for_bit(shown, step):
    found = re.search(rf"History at step {step}: saved (\w+), restored (\w+)\.", shown)
    assert found and found[1] == found[2]


def test_where_jax_detects_a_cluster_it_joins_its_peers(tmp_path):
    """As under `srun --ntasks=2`."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    told, surroundings = [], compiling.environment()
    one_device = "--xla_force_host_platform_device_count=1"  # the last counts
    for process in range(2):
        slurm = {
            "SLURM_JOB_ID": "1",
            "SLURM_STEP_NODELIST": "localhost",
            "SLURM_NTASKS": "2",
            "SLURM_PROCID": str(process),
            "SLURM_LOCALID": str(process),
            "JAX_COORDINATOR_PORT": str(port),
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": f"{surroundings['XLA_FLAGS']} {one_device}",
        }
        told.append(
            start(surroundings, "--output", str(tmp_path), "--steps", "20", **slurm)
        )
    said = [
        re.findall(rf"^process {process}  (step .*)$", printed(own), re.M)
        for process, own in enumerate(told)
    ]
    assert said[0] == said[1] and len(said[0]) == 21 and "saved" in said[0][-1]
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["20"]


def test_help_says_what_a_cluster_changes_and_starts_nothing():
    # To join this cluster would fail, and to start processes would print so.
    alone = {"JAX_COORDINATOR_ADDRESS": "nowhere.invalid:1"}
    out = printed(start(os.environ, "--help", **alone))
    assert "Where JAX detects a cluster" in out and "One process" not in out
