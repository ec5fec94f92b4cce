"""A training run on several processes that is killed, resumed, and moved.

A small Flax network, sharded over every device of every process, learns with a bound on
the norm, a guard against bad steps and a bound on its weights. One batch holds a NaN in
one process's rows only, two have targets a thousand times too large.

    python examples/multihost.py

starts two processes of two CPU devices each on this machine. It shows that both see
the same norm and drop the same step, that the losses are those of one process with one
device, that a killed run resumes bit for bit from its Orbax checkpoint, and that it
goes on with one process of six devices.

Where JAX detects a cluster (SLURM, GKE, TPU pods, or JAX_COORDINATOR_ADDRESS), it
starts no process: run the same command on every host, and it joins its peers, trains,
and saves to or resumes from --output, a folder that all hosts must share.
"""

import argparse
import os
import pathlib
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import optclip

INPUTS, WIDTH, BATCH = 12, 48, 48  # whole on 1, 2, 3, 4 or 6 devices along an axis
STEPS, SAVE_EVERY = 60, 20
KILLED_AT = 26  # the resumed run repeats the steps since its checkpoint
NAN, SPIKES = 12, (18, 33)  # bad batches, of steps that count from 1
SECONDS = 300  # for one group of processes

OPTIMIZER = optax.named_chain(
    ("norm", optclip.clip_by_global_norm(100.0)),
    # Drops what is not finite; `spike_clip` and AdamW never see it.
    (
        "guard",
        optclip.skip_step(
            optax.named_chain(
                ("spikes", optclip.spike_clip()), ("adamw", optax.adamw(1e-3))
            ),
            threshold=jnp.inf,
        ),
    ),
    ("weights", optclip.clip_weights(0.5)),
)


class Network(nnx.Module):
    """Two hidden layers, the second beside a skip connection."""

    def __init__(self, rngs: nnx.Rngs):
        self.first = nnx.Linear(INPUTS, WIDTH, rngs=rngs)
        self.second = nnx.Linear(WIDTH, WIDTH, rngs=rngs)
        self.head = nnx.Linear(WIDTH, INPUTS, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = nnx.gelu(self.first(x))
        return self.head(x + nnx.gelu(self.second(x)))


class Training(nnx.Module):
    """All that changes: the network and the optimizer's state."""

    def __init__(self):
        self.network = Network(nnx.Rngs(0))
        self.optimizer = nnx.Optimizer(self.network, OPTIMIZER, wrt=nnx.Param)


# What every process does.


def make_mesh() -> Mesh:
    """All devices of all processes, two of each process side by side along "model"."""
    model = 2 if jax.local_device_count() % 2 == 0 else 1
    shape = jax.device_count() // model, model
    auto = (jax.sharding.AxisType.Auto,) * 2
    return jax.make_mesh(shape, ("data", "model"), axis_types=auto)


def shardings(mesh: Mesh, state: nnx.State) -> nnx.State:
    """Kernels and their moments over all devices, what is small on each of them."""

    def sharding(x: jax.ShapeDtypeStruct) -> NamedSharding:
        sides = zip(x.shape, mesh.devices.shape, strict=False)
        split = x.size >= INPUTS * WIDTH and not any(n % by for n, by in sides)
        return NamedSharding(mesh, P("data", "model") if split else P())

    return jax.tree.map(sharding, state)


def batch(step: int, mesh: Mesh) -> tuple[jax.Array, jax.Array]:
    """The same numbers on any mesh; every process holds its own rows of them."""
    random = np.random.default_rng(step)
    rows = -(-BATCH // mesh.shape["data"]) * mesh.shape["data"]
    x = random.normal(size=(rows, INPUTS)).astype(np.float32)
    y = np.sin(2 * x + x[:, ::-1])
    y *= 1000 if step in SPIKES else 1
    if step == NAN:
        x[-1, 0] = np.nan
    sharding, shape = NamedSharding(mesh, P("data")), x.shape
    return (
        jax.make_array_from_callback(shape, sharding, x.__getitem__),
        jax.make_array_from_callback(shape, sharding, y.__getitem__),
    )


def fingerprint(training: Training) -> str:
    """Of the norms that `spike_clip` has seen, to the last bit."""
    learned = training.optimizer.opt_state["guard"].inner_state["spikes"].threshold
    arrays = [np.asarray(x) for x in jax.tree.leaves(learned)]
    return f"{zlib.crc32(b''.join(x.tobytes() for x in arrays)):08x}"


def train(output: pathlib.Path, steps: int, pause_at: int | None = None) -> None:
    """Trains from the last checkpoint, or from the start, and prints every step."""
    mesh = make_mesh()
    graph, abstract = nnx.split(nnx.eval_shape(Training))
    placed = shardings(mesh, abstract)

    def start() -> nnx.State:
        return nnx.state(Training())

    def step(state: nnx.State, x: jax.Array, y: jax.Array) -> tuple:
        training = nnx.merge(graph, state)

        def loss_of(network: Network) -> jax.Array:
            return jnp.mean((network(x) - y) ** 2)

        loss, gradient = nnx.value_and_grad(loss_of)(training.network)
        training.optimizer.update(training.network, gradient)
        seen = optclip.metrics(training.optimizer, short=True)
        chosen = {
            "loss": loss,
            "norm": seen["norm/size"],
            "limit": seen["guard/spikes/limit"],
            "skipped": seen["guard/skipped_steps"],
        }
        return nnx.state(training), chosen

    step = jax.jit(step, donate_argnums=0, out_shardings=(placed, None))

    def say(number: int, **numbers: object) -> None:
        words = [f"{name} {value!s}" for name, value in numbers.items()]
        print(f"process {jax.process_index()}  step {number:2}", *words, sep="  ")
        sys.stdout.flush()

    with ocp.CheckpointManager(output.resolve() / "checkpoints") as checkpoints:
        done = checkpoints.latest_step() or 0
        if done:
            # Each process reads what its devices need, whatever wrote the checkpoint.
            target = jax.tree.map(
                lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where),
                abstract,
                placed,
            )
            state = checkpoints.restore(done, args=ocp.args.StandardRestore(target))
            say(done, restored=fingerprint(nnx.merge(graph, state)))
        else:
            state = jax.jit(start, out_shardings=placed)()
        for number in range(done + 1, steps + 1):
            state, seen = step(state, *batch(number, mesh))
            say(number, **jax.device_get(seen))
            if number % SAVE_EVERY == 0:
                checkpoints.save(number, args=ocp.args.StandardSave(state))
                checkpoints.wait_until_finished()
                say(number, saved=fingerprint(nnx.merge(graph, state)))
            if number == pause_at:
                say(number, paused=True)
                time.sleep(SECONDS)


# What the one process does that starts the others.

Said = dict[str, str]  # the line "process 0  step 1  loss 0.5", by its words


def run(
    processes: int, devices: int, output: pathlib.Path, steps: int, kill: bool = False
) -> list[list[Said]]:
    """What each process of a group says until it ends, or is killed at its pause."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    count = f"--xla_force_host_platform_device_count={devices}"
    surroundings = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo",
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {count}",  # the last counts
    }
    command = [sys.executable, *(f"-W{option}" for option in sys.warnoptions), __file__]
    command += ["--output", str(output), "--steps", str(steps)]
    command += ["--pause-at", str(KILLED_AT)] if kill else []
    with tempfile.TemporaryFile("w+") as errors:
        group = [
            subprocess.Popen(
                [*command, "--join", f"{port},{processes},{process}"],
                env=surroundings,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )
            for process in range(processes)
        ]
        late = threading.Timer(SECONDS, lambda: [process.kill() for process in group])
        late.start()
        try:
            said = [listen(process) for process in group]
            codes = [0 if kill else process.wait() for process in group]
        finally:
            late.cancel()
            for process in group:
                process.kill()
                process.communicate()
        errors.seek(0)
        if any(codes) or any(not own or int(own[-1]["step"]) != steps for own in said):
            sys.exit(f"A process ended early.\n{errors.read()}")
    return said


def listen(process: subprocess.Popen) -> list[Said]:
    """The lines of a process until it ends or pauses; libraries have others."""
    said = []
    for line in process.stdout or ():
        if line.startswith("process "):
            words = line.split()
            said.append(dict(zip(words[::2], words[1::2], strict=True)))
            if "paused" in said[-1]:
                break
    return said


def of_each_step(said: list[Said], word: str) -> dict[int, str]:
    """What a process said of its steps."""
    return {int(line["step"]): line[word] for line in said if word in line}


def furthest(losses: dict[int, str], alone: dict[int, str]) -> float:
    """The largest relative difference from the losses of one device, but for NaN."""
    pairs = [(float(loss), float(alone[step])) for step, loss in losses.items()]
    return max(abs(a - b) / b for a, b in pairs if not np.isnan(b))


def show(output: pathlib.Path) -> None:
    """The run alone, in a group that is killed and resumed, and moved."""
    by_itself, together = output / "one-process", output / "two-processes"
    for folder in (by_itself, together):  # of an earlier run
        shutil.rmtree(folder, ignore_errors=True)
    print("One process of one device ...", flush=True)
    (alone,) = run(1, 1, by_itself, STEPS)
    print("Two processes of two devices, to be killed ...", flush=True)
    killed = run(2, 2, together, KILLED_AT, kill=True)
    print("The same, resumed ...", flush=True)
    resumed = run(2, 2, together, 2 * SAVE_EVERY)
    print("One process of six devices, resumed once more ...\n", flush=True)
    (moved,) = run(1, 6, together, STEPS)

    notes = {
        1: "",
        NAN: "a NaN in one row: every process drops the step",
        SPIKES[0]: "targets × 1000: clipped",
        SAVE_EVERY: "saved",
        KILLED_AT: f"killed, and resumed from step {SAVE_EVERY}",
        SPIKES[1]: "targets × 1000: clipped",
        2 * SAVE_EVERY: "saved, and moved to six devices",
        STEPS: "",
    }
    lines = [a + b for a, b in zip(killed, resumed, strict=True)]
    norms = [of_each_step(said + moved, "norm") for said in lines]
    losses = [of_each_step(said, "loss") for said in (alone, lines[0], moved)]
    limits = of_each_step(lines[0] + moved, "limit")
    by_one, by_many = losses[0], losses[1] | losses[2]
    print(f"step  {'norm: process 0':16}{'process 1':12}{'limit':12}", end="")
    print(f"{'loss':12}{'of one device':16}")
    for step, note in notes.items():
        other = norms[1][step] if step <= 2 * SAVE_EVERY else ""
        limit = limits[step] if float(limits[step]) < 1e38 else "none"
        print(f"{step:4}  {norms[0][step]:16}{other:12}{limit:12}", end="")
        print(f"{by_many[step]:12}{by_one[step]:16}{note}".rstrip())

    same = [norms[0][step] == norms[1][step] for step in losses[1]]
    print(f"\nEqual norms in both processes: {sum(same)} of {len(same)} steps.")
    difference = furthest(losses[1], by_one)
    print(f"Losses of two processes: within {difference:.1e} of those of one device.")
    before, after = (of_each_step(said[0], "loss") for said in (killed, resumed))
    again = [before[step] == after[step] for step in before if step in after]
    print(f"Steps repeated after the kill: {sum(again)} of {len(again)} bit for bit.")
    for step, wrote, read in (
        (SAVE_EVERY, killed[0], [*resumed[0], *resumed[1]]),
        (2 * SAVE_EVERY, resumed[0], moved),
    ):
        found = {line["restored"] for line in read if "restored" in line}
        saved = of_each_step(wrote, "saved")[step]
        print(f"History at step {step}: saved {saved}, restored {', '.join(found)}.")
    difference = furthest(losses[2], by_one)
    print(f"Losses of six devices: within {difference:.1e} of those of one device.")
    print(f"\nThe checkpoints are in {together}")


def main() -> None:
    description, _, rest = (__doc__ or "").partition("\n\n")
    options = argparse.ArgumentParser(
        description=description,
        epilog=rest,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    output = pathlib.Path(__file__).parent / "output" / "multihost"
    options.add_argument("--output", type=pathlib.Path, default=output)
    options.add_argument(
        "--steps", type=int, default=STEPS, help="how many, where there is a cluster"
    )
    # For the processes that this program starts itself.
    options.add_argument("--join", help=argparse.SUPPRESS)
    options.add_argument("--pause-at", type=int, help=argparse.SUPPRESS)
    chosen = options.parse_args()
    if chosen.join:
        port, *numbers = map(int, chosen.join.split(","))
        jax.distributed.initialize(
            f"localhost:{port}",
            *numbers,
            coordinator_bind_address=f"localhost:{port}",
            cluster_detection_method="deactivate",
        )
    else:
        try:
            jax.distributed.initialize()
        except ValueError:  # no cluster
            return show(chosen.output)
    train(chosen.output, chosen.steps, chosen.pause_at)


if __name__ == "__main__":
    main()
