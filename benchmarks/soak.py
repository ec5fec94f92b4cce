"""A long run of every rule and set: no leak, no second compilation, exact counters.

    python -m benchmarks.soak            20,000 steps, half an hour on two busy cores
    python -m benchmarks.soak --save     also renew benchmarks/results
    python -m benchmarks.soak --new --save     only of rows that are not there yet

All rows of the laws' table take one jitted step together on a mesh of eight CPU
devices, over and over. Each step draws one random tree: ordinary, zero, a spike, or
with a NaN or an infinity at one random place. The host draws which, so it knows what
every counter must say at the end. The parameters of sets go on from step to step, and
start again where a bad number took them.
"""

import argparse
import gc
import importlib.metadata
import json
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from tqdm import tqdm

import optclip
from tests.laws.table import PROJECTIONS, ROWS, Constraint, Row

RESULTS = pathlib.Path(__file__).parent / "results" / "soak.json"
DEVICES = 8
# In every measure above each ordinary group, and below the largest of a spike.
LIMIT = 1.0
KINDS = {"ordinary": 0.8, "zero": 0.05, "spike": 0.05, "nan": 0.05, "infinity": 0.05}
ORDINARY, ZERO, SPIKE, NAN, INFINITY = range(len(KINDS))
SHAPES = {"kernel": (8, 8), "bias": (8,), "scale": (8,)}
SPECS = {"kernel": P("data", "model"), "bias": P("model"), "scale": P()}
WARM = 10  # steps until every array is there that stays
LOOKS = 10  # at what is alive


class Soaked(NamedTuple):
    """What a run found.

    Attributes:
      drawn: how many steps there were of each kind.
      at_rest: how many of those with an infinity were steps that sets let pass.
      skips: how many steps a `skip_step` must have dropped.
      traces: how often the step was traced.
      lowerings: of anything, after `WARM` steps.
      alive: how many arrays were, after `WARM` steps and at `LOOKS` later times.
      rows: what each row counted.
      versions: of the libraries that it ran with.
    """

    drawn: dict[str, int]
    at_rest: int
    skips: int
    traces: int
    lowerings: int
    alive: list[int]
    rows: dict[str, dict[str, int]]
    versions: dict[str, str]

    @property
    def steps(self) -> int:
        return sum(self.drawn.values())


_lowered: list[str] = []


def _note(event: str, duration_secs: float, **about: str | int) -> None:
    if event == "/jax/core/compile/jaxpr_to_mlir_module_duration":
        _lowered.append(event)


jax.monitoring.register_event_duration_secs_listener(_note)


class Soak:
    """The transforms of some rows, and the step that they take together."""

    def __init__(self, rows: Sequence[Row], constraints: Sequence[Constraint]):
        self.clips = {row.name: row.build(LIMIT) for row in rows}
        # At every other step, so that they count, and have something to project.
        self.sets = {
            row.name: optclip.project(row.make(LIMIT), every=2) for row in constraints
        }
        self.traces = 0
        axes = (AxisType.Auto,) * 2
        devices = jax.devices("cpu")[:DEVICES]
        shape = DEVICES // 2, 2
        mesh = jax.make_mesh(shape, ("data", "model"), axis_types=axes, devices=devices)
        self.shardings = {k: NamedSharding(mesh, spec) for k, spec in SPECS.items()}

    def start(self, params: Any) -> Any:
        """Each rule's state and counters; each set's state, parameters and counter."""
        zero = jnp.zeros((), jnp.int32)
        clips = {k: (tx.init(params), zero, zero) for k, tx in self.clips.items()}
        return clips, {
            k: (tx.init(params), params, zero) for k, tx in self.sets.items()
        }

    def step(self, carry: Any, params: Any, number: jax.Array, kind: jax.Array) -> Any:
        self.traces += 1
        clips, sets = carry
        updates = draw(jax.random.fold_in(jax.random.key(0), number), kind)
        updates = jax.lax.with_sharding_constraint(updates, self.shardings)
        clips, sets = dict(clips), dict(sets)
        for name, (state, bad, over) in clips.items():
            out, state = self.clips[name].update(updates, state, params)
            seen = optclip.metrics(state, short=True)
            clipped = seen.get("clipped_fraction", jnp.zeros(())) > 0
            clips[name] = state, bad + lost(out), over + clipped
        for name, (state, own, bad) in sets.items():
            out, state = self.sets[name].update(updates, state, own)
            own: Any = optax.apply_updates(own, out)
            gone = lost(own)
            own = {k: jnp.where(gone, params[k], x) for k, x in own.items()}
            sets[name] = state, own, bad + gone
        return clips, sets

    def run(self, steps: int) -> Soaked:
        """Many steps, whose kinds the host draws."""
        kinds, random = kinds_of(steps), np.random.default_rng(1)
        params = {
            name: jax.device_put(random.uniform(1, 2, shape), self.shardings[name])
            for name, shape in SHAPES.items()
        }
        carry = jax.jit(self.start)(params)
        # Left alone, XLA would change some on the way, and compile for them once more.
        shardings = jax.tree.map(lambda x: x.sharding, carry)
        step = jax.jit(self.step, donate_argnums=0, out_shardings=shardings)
        alive, warm = [], len(_lowered)
        for number in tqdm(range(1, steps + 1), unit="step"):
            carry = step(carry, params, np.int32(number), kinds[number - 1])
            # Where steps queue up on a busy machine, XLA:CPU may run out of threads
            # that wait for each other.
            jax.block_until_ready(carry)
            if number == WARM or number % (steps // LOOKS) == 0:
                gc.collect()
                alive.append(len(jax.live_arrays("cpu")))
            if number == WARM:
                warm = len(_lowered)
        lowerings = len(_lowered) - warm
        clips, sets = jax.device_get(carry)
        rows = {}
        for name, (state, bad, over) in clips.items():
            seen = optclip.metrics(state, short=True)
            whole = {k: int(x) for k, x in seen.items() if k.endswith("steps")}
            rows[name] = whole | {"lost": int(bad), "over": int(over)}
        for name, (state, _, bad) in sets.items():
            rows[f"project({name})"] = {"steps": int(state.steps), "lost": int(bad)}
        return Soaked(
            drawn={name: int(np.sum(kinds == n)) for n, name in enumerate(KINDS)},
            at_rest=int(np.sum(kinds[::2] == INFINITY)),  # the odd ones
            skips=skips(kinds),
            traces=self.traces,
            lowerings=lowerings,
            alive=alive,
            rows=rows,
            versions={k: importlib.metadata.version(k) for k in ("jax", "optax")},
        )


def kinds_of(steps: int) -> np.ndarray:
    """What each step draws, one of `KINDS`."""
    random, chances = np.random.default_rng(0), list(KINDS.values())
    return random.choice(len(KINDS), size=steps, p=chances).astype(np.int32)


def spoiled(steps: int, leaf: str) -> int:
    """In how many steps the NaN or the infinity stood in this leaf."""

    def here(number: jax.Array, kind: jax.Array) -> jax.Array:
        tree = draw(jax.random.fold_in(jax.random.key(0), number), kind)
        return ~jnp.isfinite(tree[leaf]).all()

    numbers = jnp.arange(1, steps + 1, dtype=jnp.int32)
    return int(jnp.sum(jax.jit(jax.vmap(here))(numbers, kinds_of(steps))))


def draw(key: jax.Array, kind: jax.Array) -> dict[str, jax.Array]:
    """A random tree of one of `KINDS`."""
    magnitude, place, *keys = jax.random.split(key, 2 + len(SHAPES))
    exponent = jax.random.uniform(magnitude, minval=-6.0, maxval=-3.0)
    exponent = jnp.where(kind == SPIKE, exponent + 9, exponent)
    scale = jnp.where(kind == ZERO, 0.0, 10.0**exponent)
    bad = jnp.where(kind == NAN, jnp.nan, jnp.inf)
    size = sum(int(np.prod(shape)) for shape in SHAPES.values())
    place = jax.random.randint(place, (), 0, size)
    place = jnp.where((kind == NAN) | (kind == INFINITY), place, -1)
    tree, before = {}, 0
    for own, (name, shape) in zip(keys, SHAPES.items(), strict=True):
        x = scale * jax.random.uniform(own, shape, minval=-1.0)
        here = before + jnp.arange(x.size, dtype=place.dtype).reshape(shape) == place
        tree[name], before = jnp.where(here, bad, x), before + x.size
    return tree


def lost(tree: Any) -> jax.Array:
    """1 if anything in a tree is not finite."""
    finite = jnp.stack([jnp.isfinite(x).all() for x in jax.tree.leaves(tree)])
    return (~finite.all()).astype(jnp.int32)


def skips(kinds: np.ndarray, max_consecutive: int = 10) -> int:
    """How many steps `skip_step(inner, LIMIT)` drops."""
    dropped = in_a_row = 0
    for kind in kinds.tolist():
        bad = kind in (NAN, INFINITY)
        drop = bad or (kind == SPIKE and in_a_row < max_consecutive)
        dropped, in_a_row = dropped + drop, in_a_row + 1 if drop else 0
    return dropped


def faults(found: Soaked) -> list[str]:
    """What a run must have found and has not."""
    wrong = []
    if found.traces != 1 or found.lowerings:
        wrong.append(f"{found.traces} traces, {found.lowerings} later lowerings")
    if len(set(found.alive)) != 1:
        wrong.append(f"live arrays: {found.alive}")
    bad = found.drawn["nan"] + found.drawn["infinity"]
    kinds = {row.name: row.kind for row in ROWS}
    for name, row in found.rows.items():
        expected: dict[str, Any] = {"steps": {found.steps}}
        kind = "set" if name.startswith("project(") else kinds.get(name)
        if kind == "set":
            # What is beyond all bounds goes to a bound, where a set has some.
            expected["lost"] = {bad, found.drawn["nan"] + found.at_rest}
        if kind in ("clip", "adaptive", "measuring", "wrapper"):
            expected["nonfinite_steps"] = {bad}
            if name == "clip_by-measured":  # which measures the kernel only
                expected["nonfinite_steps"] = {spoiled(found.steps, "kernel")}
            expected["lost"] = {0 if kind == "wrapper" else bad}
        if kind in ("clip", "wrapper"):
            expected["clipped_steps"] = {found.drawn["spike"]}
        if kind == "measuring":
            expected["clipped_steps"] = {0}
        if kind == "adaptive" and row["over"]:  # it does not say at which steps it acts
            expected["clipped_steps"] = {row["over"]}
        if kind == "wrapper":
            expected["skipped_steps"] = {found.skips}
        if kind == "elementwise":
            expected = {"lost": {found.drawn["nan"]}}
        wrong += [
            f"{name}: {field} {row.get(field)}, not {' or '.join(map(str, right))}"
            for field, right in expected.items()
            if row.get(field) not in right
        ]
    return wrong


def save(runs: Sequence[Soaked], path: pathlib.Path = RESULTS) -> None:
    """The numbers of some runs, one row a line, where `load` finds them."""
    texts = []
    for found in runs:
        about = found._asdict()
        rows = about.pop("rows")
        lines = [f"{json.dumps(k)}: {json.dumps(v)}" for k, v in rows.items()]
        texts.append(
            json.dumps(about)[:-1] + ', "rows": {\n' + ",\n".join(lines) + "\n}}"
        )
    path.write_text("[" + ",\n".join(texts) + "]\n")


def load(path: pathlib.Path = RESULTS) -> list[Soaked]:
    """The numbers that were saved: runs of different rows."""
    runs = json.loads(path.read_text())
    return [Soaked(**{name: run[name] for name in Soaked._fields}) for run in runs]


def left_out(runs: Sequence[Soaked]) -> tuple[list[Row], list[Constraint]]:
    """The rows of the laws' table that no run has had."""
    had = {name for found in runs for name in found.rows}
    return [row for row in ROWS if row.name not in had], [
        row for row in PROJECTIONS if f"project({row.name})" not in had
    ]


def main() -> None:
    options = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    options.add_argument("--steps", type=int, default=20_000)
    options.add_argument("--save", action="store_true", help=f"renew {RESULTS.name}")
    options.add_argument("--new", action="store_true", help="rows that it lacks only")
    chosen = options.parse_args()
    jax.config.update("jax_num_cpu_devices", DEVICES)
    before = load() if chosen.new else []
    found = Soak(*left_out(before)).run(chosen.steps)
    print(f"{found.steps} steps: {found.drawn}; {found.alive[0]} live arrays")
    wrong = faults(found)
    print("\n".join(wrong) if wrong else f"{len(found.rows)} rows counted exactly")
    if chosen.save and not wrong:
        save([*before, found])


if __name__ == "__main__":
    main()
