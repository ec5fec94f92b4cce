"""The races for a GPU that is at hand for a few minutes.

    python -m benchmarks --accelerator --out results    6 minutes of one GPU at most
    python -m benchmarks --accelerator --out results --minutes 3 --scale 0.1

The races run in the order of their worth. Their numbers are written to
`DIR/accelerator-DEVICE.json` after each of them, so that a run that is cut off keeps
what it had; what was left out is printed at the end. PyTorch takes part where it is
installed. Nothing is downloaded.

A call is short beside what the host needs to start it. So calls are put on the device's
queue by the dozen and waited for together: a number is the time of one of them, and the
median over rounds in which all contestants took turns.
"""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import datetime
import functools
import json
import pathlib
import random
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import optclip
from benchmarks import contestants, report, shapes
from optclip._core import numerics

ROUNDS = 7
BATCH_SECONDS = 0.03
Record = dict[str, Any]


class Racer(NamedTuple):
    """`call()` puts one step on the queue; `wait` blocks until what it gave is done."""

    call: Callable[[], Any]
    wait: Callable[[Any], Any] = jax.block_until_ready
    moved: float = 0.0  # bytes that a call cannot do without


class Timed(NamedTuple):
    """Seconds of a call in every round, and how long the host was kept by a call."""

    seconds: np.ndarray
    host: float


def race(racers: dict[str, Racer], rounds: int = ROUNDS) -> dict[str, Timed]:
    """Seconds a call, from batches of calls that are waited for together."""
    once: dict[str, float] = {}
    host: dict[str, float] = {}
    for name, (call, wait, _) in racers.items():
        wait(call())
        start = time.perf_counter()
        wait(call())
        once[name] = time.perf_counter() - start
    batch = {n: int(np.clip(BATCH_SECONDS / s, 1, 100)) for n, s in once.items()}
    rounds = rounds if max(once.values()) < 1 else 1
    seconds: dict[str, list[float]] = {name: [] for name in racers}
    order, shuffled = list(racers), random.Random(0)
    for _ in range(rounds):
        shuffled.shuffle(order)
        for name in order:
            call, wait, _ = racers[name]
            start = time.perf_counter()
            for _ in range(batch[name] - 1):
                call()
            last = call()
            host[name] = (time.perf_counter() - start) / batch[name]
            wait(last)
            seconds[name].append((time.perf_counter() - start) / batch[name])
    return {name: Timed(np.array(s), host[name]) for name, s in seconds.items()}


def records(
    racers: dict[str, Racer], timed: dict[str, Timed], profiles: bool
) -> Iterator[Record]:
    """A record for each racer, with its ratio to every other one."""
    for name, own in timed.items():
        low, middle, high = np.quantile(own.seconds, (0.25, 0.5, 0.75))
        moved = racers[name].moved
        yield {
            "name": name,
            "seconds": float(middle),
            "quartiles": [float(low), float(high)],
            "host_seconds": own.host,
            "gigabytes_per_second": moved / float(middle) / 1e9 if moved else None,
            "over": {
                other: float(np.median(own.seconds / timed[other].seconds))
                for other in timed
                if other != name
            },
        } | (on_device(racers[name]) if profiles else {})


# What takes part.


COMPILERS = concurrent.futures.ThreadPoolExecutor(8)


def compiling(lowered: Any) -> Callable[[], Any]:
    """What waits for the compiled program; all of a race compile side by side."""
    return COMPILERS.submit(lowered.compile).result


def jitted(function: Callable[..., Any], *arrays: Any, moved: float = 0.0) -> Racer:
    """A compiled function of fixed arrays."""
    program = compiling(jax.jit(function).lower(*arrays))
    return Racer(lambda: program()(*arrays), moved=moved)


def in_place(function: Callable[..., Any], state: Any, fixed: Any) -> Racer:
    """A compiled function from state and fixed arrays to the next state."""
    program = compiling(jax.jit(function, donate_argnums=0).lower(state, fixed))
    kept = [jax.tree.map(jnp.copy, state)]

    def call() -> Any:
        kept[0] = program()(kept[0], fixed)
        return kept[0]

    return Racer(call)


@contextlib.contextmanager
def as_for_cpu() -> Iterator[None]:
    """Clips that choose between one pass and two, as they do on CPU and TPU."""
    before = numerics.backend
    numerics.backend = lambda: "cpu"
    try:
        yield
    finally:
        numerics.backend = before


def clipping(
    rule: contestants.Rule, limit: float, grads: Any, *params: Any, moved: float
) -> Racer:
    """One update of a rule with its state."""
    tx = rule(limit)
    state = jax.jit(tx.init)(grads)
    return jitted(tx.update, grads, state, *params, moved=moved)


def torch_gradients(tree: contestants.Shapes, dtype: Any) -> list[Any]:
    """PyTorch's parameters with gradients, on its GPU where it has one."""
    import torch  # pyright: ignore[reportMissingImports] (in the extra "bench")

    device = "cuda" if _torch_waits() else "cpu"
    kind = getattr(torch, jnp.dtype(dtype).name)
    found = []
    for shape in tree.values():
        param = torch.nn.Parameter(torch.randn(shape, device=device).to(kind))
        param.grad = torch.randn(shape, device=device).to(kind)
        found.append(param)
    return found


def _torch_waits() -> bool:
    import torch  # pyright: ignore[reportMissingImports] (in the extra "bench")

    return jax.default_backend() == "gpu" and torch.cuda.is_available()


def with_torch(call: Callable[[], Any], moved: float = 0.0) -> Racer:
    """A call of PyTorch's."""
    import torch  # pyright: ignore[reportMissingImports] (in the extra "bench")

    waits = _torch_waits()
    wait = (lambda _: torch.cuda.synchronize()) if waits else (lambda _: None)
    return Racer(call, wait, moved)


# The races.

Race = Callable[[float], dict[str, Racer]]


def bandwidth(dtype: str, scale: float) -> dict[str, Racer]:
    """What the device reads and copies; the norm of one array of a gigabyte."""
    width = max(int(16384 * np.sqrt(scale)), 8)
    rows = width * (1 if dtype == "float32" else 2)
    x = contestants.normal({"x": (rows, width)}, dtype)["x"]
    size = x.nbytes
    found = {
        "read (sum)": jitted(lambda x: jnp.sum(x, dtype=jnp.float32), x, moved=size),
        "copy": jitted(lambda x: -x, x, moved=2 * size),
        "optclip.global_norm": jitted(optclip.global_norm, [x], moved=size),
        "optax.global_norm": jitted(optax.global_norm, [x], moved=size),
    }
    for name, limit in (("clips", 0.5), ("does not clip", 1e30)):
        for library, rule in (
            ("optclip", optclip.clip_by_global_norm),
            ("optax", optax.clip_by_global_norm),
        ):
            racer = clipping(rule, limit, [x], moved=3 * size)
            found[f"{library}.clip_by_global_norm, {name}"] = racer
        with as_for_cpu():
            racer = clipping(optclip.clip_by_global_norm, limit, [x], moved=3 * size)
        found[f"the same with a conditional, {name}"] = racer
    if jax.default_backend() != "cpu":
        with jax.enable_x64(True):  # sums that never leave their range
            found["norm by float64 sums"] = jitted(
                lambda x: jnp.sqrt(jnp.sum(jnp.square(x.astype(jnp.float64)))),
                x,
                moved=size,
            )
    try:
        grads = [p.grad for p in torch_gradients({"x": x.shape}, dtype)]
        import torch  # pyright: ignore[reportMissingImports] (in the extra "bench")
    except ImportError:
        return found
    norm = functools.partial(torch.nn.utils.get_total_norm, grads, foreach=True)
    return found | {"torch get_total_norm": with_torch(norm, size)}


def adamw(shape_set: str, dtype: str, scale: float) -> dict[str, Racer]:
    """A clip before AdamW, against AdamW and the eight passes that it has to make."""
    tree = shapes.SETS[shape_set](scale)
    optimizer = optax.adamw(1e-3)
    (params, state), grads = contestants.parameters(optimizer, tree, jnp.dtype(dtype))
    size = contestants.size_in_bytes(tree, dtype)
    rules: dict[str, Any] = {
        "optax.adamw": None,
        "optclip clip + adamw": optclip.clip_by_global_norm(0.5),
        "optax clip + adamw": optax.clip_by_global_norm(0.5),
    }
    found = {}
    for name, clip in rules.items():
        tx = optimizer if clip is None else optax.chain(clip, optimizer)
        start = state if clip is None else (jax.jit(clip.init)(params), state)

        def step(kept: Any, grads: Any, tx: Any = tx) -> Any:
            params, state = kept
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        moved = 7 * size if clip is None else 8 * size
        found[name] = in_place(step, (params, start), grads)._replace(moved=moved)
        if name.startswith("optclip"):
            with as_for_cpu():  # in a new function, for JAX keeps what it traced
                racer = in_place(lambda *a, s=step: s(*a), (params, start), grads)
            found["the same with a conditional"] = racer._replace(moved=moved)

    def floor(kept: Any, grads: Any) -> Any:
        """Reads the gradients once, then four trees, and writes three in place."""
        sums = [jnp.sum(x, dtype=jnp.float32) for x in jax.tree.leaves(grads)]
        nearly = (1 - 1e-9 * functools.reduce(jnp.add, sums)).astype(dtype)
        return [jax.tree.map(lambda x, g: x * nearly + g, x, grads) for x in kept]

    trees = [jax.tree.map(jnp.copy, params) for _ in range(3)]
    found["floor: read 5, write 3"] = in_place(floor, trees, grads)._replace(
        moved=8 * size
    )
    try:
        weights = torch_gradients(tree, dtype)
        import torch  # pyright: ignore[reportMissingImports] (in the extra "bench")
    except ImportError:
        return found
    for how in ("foreach", "fused"):
        if how == "fused" and not _torch_waits():
            continue
        foreach, fused = how == "foreach", how == "fused"
        stepper = torch.optim.AdamW(weights, lr=1e-3, foreach=foreach, fused=fused)

        def clipped(stepper: Any = stepper) -> None:
            torch.nn.utils.clip_grad_norm_(weights, 0.5, foreach=True)
            stepper.step()

        found[f"torch clip + {how} adamw"] = with_torch(clipped, 8 * size)
    return found


def small_leaves(scale: float) -> dict[str, Racer]:
    """1000 leaves of a few thousand numbers: what starting a kernel for each costs."""
    tree = shapes.small(scale)
    grads = contestants.normal(tree, jnp.float32)
    size = contestants.size_in_bytes(tree, jnp.float32)
    found = {
        "optclip.clip_by_global_norm": clipping(
            optclip.clip_by_global_norm, 0.5, grads, moved=3 * size
        ),
        "optax.clip_by_global_norm": clipping(
            optax.clip_by_global_norm, 0.5, grads, moved=3 * size
        ),
    }
    try:
        weights = torch_gradients(tree, jnp.float32)
        import torch  # pyright: ignore[reportMissingImports] (in the extra "bench")
    except ImportError:
        return found
    clip = functools.partial(torch.nn.utils.clip_grad_norm_, weights, 0.5, foreach=True)
    return found | {"torch clip_grad_norm_": with_torch(clip, 3 * size)}


def other_rules(dtype: str, scale: float) -> dict[str, Racer]:
    """AGC and block RMS by both libraries, and `spike_clip`, on GPT-2's shapes."""
    tree = shapes.gpt2(scale)
    grads = contestants.normal(tree, jnp.dtype(dtype))
    params = contestants.normal(tree, jnp.dtype(dtype), seed=1)
    size = contestants.size_in_bytes(tree, dtype)
    found = {}
    for rule in ("adaptive_grad_clip", "clip_by_block_rms"):
        given = (params,) if rule == "adaptive_grad_clip" else ()
        for library, rules in (
            ("optclip", contestants.OPTCLIP),
            ("optax", contestants.OPTAX),
        ):
            moved = (4 if given else 3) * size
            racer = clipping(rules[rule], 0.1, grads, *given, moved=moved)
            found[f"{library}.{rule}"] = racer
            if library == "optclip":
                with as_for_cpu():
                    racer = clipping(rules[rule], 0.1, grads, *given, moved=moved)
                found[f"{rule} with a conditional"] = racer
    found["optclip.spike_clip"] = clipping(
        lambda _: optclip.spike_clip(), 0.0, grads, moved=3 * size
    )
    found["optclip.clip_by_global_norm"] = clipping(
        optclip.clip_by_global_norm, 0.5, grads, moved=3 * size
    )
    return found


def small_model(scale: float) -> dict[str, Racer]:
    """Training steps of a small network, put on the queue without a wait between."""
    width, batch = max(int(256 * np.sqrt(scale)), 8), 64
    layers = {f"layer_{n}": (width, width) for n in range(6)}
    params = {
        name: x / np.sqrt(width)
        for name, x in contestants.normal(layers, jnp.float32).items()
    }
    inputs = contestants.normal({"x": (batch, width)}, jnp.float32)["x"]

    def loss(params: Any, x: jax.Array) -> jax.Array:
        y = x
        for kernel in params.values():
            y = jnp.tanh(y @ kernel)
        return jnp.mean(jnp.square(y - x))

    found = {}
    for name, clip in {
        "adam": optax.identity(),
        "optclip clip + adam": optclip.clip_by_global_norm(0.01),
        "optax clip + adam": optax.clip_by_global_norm(0.01),
        "optclip spike_clip + adam": optclip.spike_clip(),
        "optclip skip_step(adam)": None,
    }.items():
        adam = optax.adam(1e-4)
        tx = optax.chain(clip, adam) if clip else optclip.skip_step(adam, 1e30)

        def step(kept: Any, x: jax.Array, tx: Any = tx) -> Any:
            params, state = kept
            grads = jax.grad(loss)(params, x)
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        start = params, jax.jit(tx.init)(params)
        found[name] = in_place(step, start, inputs)
        if name == "optclip clip + adam":
            with as_for_cpu():
                again = in_place(lambda *a, s=step: s(*a), start, inputs)
            found["the same with a conditional"] = again
    return found


def sets_of_matrices(scale: float) -> dict[str, Racer]:
    """The projections that factorise or sort, of one matrix."""
    width = max(int(4096 * np.sqrt(scale)), 8)
    x = contestants.normal({"x": (width, width)}, jnp.float32)["x"]
    sets = {
        "simplex": optclip.sets.simplex(),
        "l1_ball": optclip.sets.l1_ball(1.0),
        "spectral_ball(iterations=10)": optclip.sets.spectral_ball(1.0, iterations=10),
        "max_norm": optclip.sets.max_norm(1.0),
    }
    found = {
        name: jitted(functools.partial(_projected, constraint), x, moved=2 * x.nbytes)
        for name, constraint in sets.items()
    }
    found["matrix product"] = jitted(lambda x: x @ x, x)
    found["optax.projections.projection_simplex"] = jitted(
        lambda x: jax.vmap(optax.projections.projection_simplex)(x),
        x,
        moved=2 * x.nbytes,
    )
    return found


def factorised(scale: float) -> dict[str, Racer]:
    """The projection by a singular value decomposition, of one matrix."""
    width = max(int(4096 * np.sqrt(scale)), 8)
    x = contestants.normal({"x": (width, width)}, jnp.float32)["x"]
    ball = functools.partial(_projected, optclip.sets.spectral_ball(1.0))
    return {
        "spectral_ball": jitted(ball, x),
        "singular value decomposition": jitted(jnp.linalg.svd, x),
    }


def _projected(constraint: Any, x: jax.Array) -> jax.Array:
    return optclip.project_params(x, constraint)


def on_device(racer: Racer) -> Record:
    """What one call puts on the device, from a profile; empty where none is made."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            racer.wait(racer.call())
        traces = sorted(pathlib.Path(folder).rglob("*.xplane.pb"))
        events = [event for path in traces for event in _device_events(path)]
    if not events:
        return {}
    kinds: dict[str, float] = collections.defaultdict(float)
    for name, seconds in events:
        kinds[re.sub(r"[_.\d]+$", "", name)] += seconds
    longest = sorted(kinds, key=kinds.__getitem__, reverse=True)[:5]
    return {
        "kernels": len([name for name, _ in events if "memcpy" not in name.lower()]),
        "copies_to_host": len([name for name, _ in events if _to_host(name)]),
        "busy_seconds": sum(seconds for _, seconds in events),
        "longest": {name: kinds[name] for name in longest},
    }


def _device_events(path: pathlib.Path) -> list[tuple[str, float]]:
    """Names and seconds of what ran on the streams of a GPU; none elsewhere."""
    data = jax.profiler.ProfileData.from_file(str(path))
    return [
        (event.name, event.duration_ns * 1e-9)
        for plane in data.planes
        if plane.name.startswith("/device:GPU")
        for line in plane.lines
        if line.name.startswith("Stream")
        for event in line.events
    ]


def _to_host(name: str) -> bool:
    return bool(re.search(r"d2h|dtoh|devicetohost", re.sub(r"\W", "", name.lower())))


def waiting(scale: float) -> list[Record]:
    """How long a call of `update` keeps the host while the device is busy."""
    width = max(int(8192 * np.sqrt(scale)), 8)
    x = contestants.normal({"x": (width, width)}, jnp.bfloat16)["x"]

    @jax.jit
    def busy(x: jax.Array) -> jax.Array:
        for _ in range(20):
            x = x @ x * jnp.bfloat16(1e-2)
        return x

    jax.block_until_ready(busy(x))
    start = time.perf_counter()
    jax.block_until_ready(busy(x))
    found: list[Record] = [
        {"name": "the work before it", "seconds": time.perf_counter() - start}
    ]
    for name, tx in {
        "optclip.clip_by_global_norm": optclip.clip_by_global_norm(0.5),
        "the same with a conditional": optclip.clip_by_global_norm(0.5),
        "optax.clip_by_global_norm": optax.clip_by_global_norm(0.5),
        "optclip.spike_clip": optclip.spike_clip(),
    }.items():
        state = jax.jit(tx.init)(x)
        form = as_for_cpu() if "conditional" in name else contextlib.nullcontext()
        with form:
            program = jax.jit(tx.update).lower(x, state).compile()
        jax.block_until_ready(program(x, state))
        seconds = []
        for _ in range(5):
            before = busy(x)
            start = time.perf_counter()
            after = program(before, state)
            seconds.append(time.perf_counter() - start)
            jax.block_until_ready(after)
        found.append({"name": name, "seconds": float(np.median(seconds))})
    return found


RACES: dict[str, Callable[[float], dict[str, Racer] | list[Record]]] = {
    "one gigabyte, float32": functools.partial(bandwidth, "float32"),
    "one gigabyte, bfloat16": functools.partial(bandwidth, "bfloat16"),
    "host kept by a call": waiting,
    "AdamW, GPT-2 124M, float32": functools.partial(adamw, "gpt2", "float32"),
    "AdamW, GPT-2 124M, bfloat16": functools.partial(adamw, "gpt2", "bfloat16"),
    "training a small network": small_model,
    "1000 small leaves": small_leaves,
    "other rules, GPT-2 124M, float32": functools.partial(other_rules, "float32"),
    "other rules, GPT-2 124M, bfloat16": functools.partial(other_rules, "bfloat16"),
    "projections of one matrix": sets_of_matrices,
    "spectral_ball by factorisation": factorised,
}


def run(out: pathlib.Path, minutes: float, scale: float, wanted: str = "") -> int:
    """Every race whose name matches, in order, until time is up; 1 if one was left."""
    end = time.monotonic() + 60 * minutes
    out.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {
        "device": report.device(),
        "date": datetime.date.today().isoformat(),
        "versions": contestants.about_peers(),
        "scale": scale,
        "races": {},
        "seconds": {},
        "left": [],
    }
    kind = re.sub(r"\W+", "-", results["device"].lower()).strip("-")
    path = out / f"accelerator-{kind}.json"
    print(f"{results['device']}: {minutes:g} minutes at most", flush=True)
    names = [name for name in RACES if re.search(wanted, name)]
    longest = 0.0
    for name in names:
        if time.monotonic() + longest > end:
            results["left"].append(name)
            continue
        start = time.monotonic()
        print(f"\n{name} ({end - start:.0f} s left)", flush=True)
        try:
            entered = RACES[name](scale)
            if isinstance(entered, dict):
                compiled = time.monotonic() - start
                # Profiles of a race take some seconds, and one has taken half a minute:
                # in the last minute they would cost the next race.
                profiles = end - time.monotonic() > 60
                found = list(records(entered, race(entered), profiles))
                print(f"  compiled in {compiled:.0f} s", flush=True)
            else:
                found = entered
            entered = None  # so that its arrays are free before the next race's
        except Exception as reason:  # one race's failure must not cost the others
            found = [{"name": "failed", "error": f"{type(reason).__name__}: {reason}"}]
        results["races"][name] = found
        took = time.monotonic() - start
        longest = max(longest, took)
        results["seconds"][name] = round(took, 1)
        path.write_text(json.dumps(results, indent=1) + "\n")
        for line in found:
            print("  " + described(line), flush=True)
        jax.clear_caches()
    if results["left"]:
        print(f"\nNo time was left for: {', '.join(results['left'])}.")
    path.write_text(json.dumps(results, indent=1) + "\n")
    report.draw_races(results, path.with_suffix(".png"))
    print(f"\nWritten: {path} and {path.with_suffix('.png')}")
    return int(bool(results["left"]))


def described(line: Record) -> str:
    """A record in one line of the terminal."""
    words = [f"{line['name'][:42]:42}"]
    if "seconds" in line:
        words.append(f"{1e3 * line['seconds']:9.3f} ms")
    if line.get("gigabytes_per_second"):
        words.append(f"{line['gigabytes_per_second']:7.0f} GB/s")
    if line.get("host_seconds"):
        words.append(f"host {1e3 * line['host_seconds']:8.3f} ms")
    if "busy_seconds" in line:
        words.append(f"busy {1e3 * line['busy_seconds']:8.3f} ms")
    others = ("kernels", "copies_to_host", "error")
    words += [f"{key} {line[key]}" for key in others if key in line]
    return "  ".join(words)
