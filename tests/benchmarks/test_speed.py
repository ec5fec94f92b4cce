"""The benchmark runs, counts its bytes rightly, and its committed numbers are read."""

import json
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from benchmarks import __main__ as suite
from benchmarks import (
    constrained,
    contestants,
    contexts,
    page_table,
    report,
    shapes,
    timing,
)
from benchmarks.progress import Progress
from docs import benchmark_tables

TINY = {"kernel": (8, 6), "bias": (6,)}


@pytest.mark.parametrize(
    ("name", "parameters", "leaves"),
    [
        ("gpt2", 124_439_808, 148),
        ("gpt2-xl", 1_557_611_200, 580),
        ("resnet50", 25_557_032, 161),
    ],
)
def test_shapes_are_those_of_the_models(name, parameters, leaves):
    """As the papers count them."""
    made = shapes.SETS[name]()
    assert sum(int(np.prod(shape)) for shape in made.values()) == parameters
    assert len(made) == leaves


@pytest.mark.parametrize("name", shapes.SETS)
def test_scale_is_about_proportional(name):
    count = [
        sum(np.prod(shape, dtype=float) for shape in shapes.SETS[name](scale).values())
        for scale in (1.0, 0.25)
    ]
    assert 2.5 < count[0] / count[1] < 6


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=lambda d: d.__name__)
@pytest.mark.parametrize("rule", ["clip_by_global_norm", "clip_by_block_rms"])
def test_every_call_clips(rule, dtype):
    """What is timed is a rescaling, not the shorter way of what is within its limit."""
    arrays = contestants.gradients(TINY, dtype)
    entered = {
        "floor": contestants.rewriting(arrays),
        "optclip": contestants.clipping(contestants.OPTCLIP[rule], arrays),
        "optax": contestants.clipping(contestants.OPTAX[rule], arrays),
    }
    own = {name: contestant.own for name, contestant in entered.items()}
    for number in range(9):
        name = list(entered)[number % 3]
        before = np.abs(arrays.tree["kernel"])
        arrays, own[name] = entered[name].step(arrays, own[name], 0.5 * 0.99**number)
        after = np.abs(arrays.tree["kernel"])
        # The floor's factor is nearly one, and in bfloat16 one.
        assert np.all(after <= before if name == "floor" else after < before)
    assert own["optclip"].metrics.clipped_steps == 3


def test_libraries_do_the_same():
    """Ours and Optax's, without parameters and with them."""
    for params, rule in ((False, "clip_by_block_rms"), (True, "adaptive_grad_clip")):
        found = []
        for library in (contestants.OPTCLIP, contestants.OPTAX):
            arrays = contestants.gradients(TINY, jnp.float32, params)
            contestant = contestants.clipping(library[rule], arrays)
            found.append(contestant.step(arrays, contestant.own, 0.3)[0].tree)
        for path in TINY:
            np.testing.assert_allclose(found[0][path], found[1][path], rtol=1e-6)


def entered(race, without=("torch", "keras")):
    """The arrays, and contestants that are installed wherever tests run."""
    arrays = race.draw()
    makers = {
        name: make for name, make in race.makers.items() if not name.startswith(without)
    }
    with jax.numpy_dtype_promotion("standard"):  # which Optax's optimizers need
        return arrays, {name: make(arrays) for name, make in makers.items()}


def test_a_race_takes_turns_and_its_record_holds_the_ratios():
    arrays, racing = entered(contexts.alone("clip_by_value", TINY, jnp.float32))
    rounds = []
    timed = timing.race(racing, arrays, 3, after_round=lambda: rounds.append(1))
    about = {"shapes": "tiny", "dtype": "float32", "context": "alone"}
    line = report.record(about | {"rule": "clip_by_value"}, "optclip", timed, 54 * 4)
    assert len(timed["optclip"].seconds) == 3 and line["seconds"] > 0
    assert len(rounds) == 3 + timing.WARM_UP
    assert set(line["over"]) == {"floor: read", "floor: rewrite", "optax", "floor"}
    low, middle, high = line["over"]["optax"]
    assert low <= middle <= high
    assert line["over"]["floor"] == line["over"]["floor: rewrite"]  # it reads once
    assert line["temporary_bytes"] >= 0 and line["collectives"] == 0


STEPS = {
    "learned": contexts.learned,
    "sgd": lambda tree, dtype: contexts.before("sgd", tree, dtype),
    "adamw": lambda tree, dtype: contexts.before("adamw", tree, dtype),
    "skip": contexts.skipping,
}


@pytest.mark.parametrize("context", STEPS)
def test_races_of_several_rules_run(context):
    """Each contestant goes on where another one stopped."""
    arrays, racing = entered(STEPS[context](TINY, jnp.bfloat16))
    timed = timing.race(racing, arrays, rounds=2)
    assert all(len(own.seconds) == 2 for own in timed.values())


def test_compiling_is_raced_from_cold_caches():
    about = {"shapes": "tiny", "dtype": "float32", "context": "compile", "rule": "-"}
    race = contexts.compiled("clip_by_block_rms", TINY, jnp.float32)
    arrays, racing = entered(race)
    timed = timing.race(racing, arrays, 2, warm_up=0)
    line = report.record(about, "optclip", timed, 54 * 4)
    assert line["seconds"] > 1e-3  # a call of what is compiled takes microseconds
    assert set(line["over"]) == {"optax"}


def test_wrappers_step_as_the_optimizer_does_and_hand_its_state_on():
    """Of whichever wrapper: the moments are those of AdamW alone, after each call."""
    arrays, racing = entered(contexts.skipping(TINY, jnp.float32))
    racing.pop("optclip clip_by_global_norm")
    alone, _ = entered(contexts.skipping(TINY, jnp.float32))
    assert set(racing) == {"alone", "optclip skip_step", "optax apply_if_finite"}
    for contestant in racing.values():
        arrays, own = contestant.step(arrays, contestant.own, 0.5)
        assert contestant is racing["alone"] or own.inner_state == ()
        alone, _ = racing["alone"].step(alone, racing["alone"].own, 0.5)
        chex.assert_trees_all_close(arrays.tree, alone.tree, rtol=1e-6)
    assert arrays.tree[1][0].count == 3


UNITS = {"token/embedding": (5, 4), "up/kernel": (4, 6), "up/bias": (6,)}


def test_a_step_whose_parameters_end_in_a_set_is_raced():
    arrays, racing = entered(contexts.projecting("box", UNITS, jnp.bfloat16))
    assert set(racing) == {*constrained.ways("box")}
    for name, contestant in racing.items():
        arrays, _ = contestant.step(arrays, contestant.own, 0.5)
        inside = jnp.abs(arrays.tree[0]["up/kernel"]).max() <= constrained.C
        assert inside == (name != "alone")


@pytest.mark.parametrize("name", constrained.SETS)
def test_sets_are_the_same_by_whatever_way(name):
    """At the end of the chain, after the step, by hand and by Optax, twice."""
    ways = constrained.ways(name)
    ways.pop("keras", None)  # may not be installed
    params = contestants.normal(UNITS, jnp.float32)
    updates = jax.tree.map(lambda x: 0.5 * x, params)

    @jax.jit
    def stepped(params, updates):
        found = {}
        for key, way in ways.items():
            tx = way.last()
            own, _ = tx.update(updates, tx.init(params), params)
            found[key] = way.after()(optax.apply_updates(params, own))
        return found

    for _ in range(2):
        found = stepped(params, updates)
        free, by_hand = found.pop("alone"), found.pop("by hand")
        weights = found.pop("clip_weights", found["project"])
        for path, x in free.items():
            assert jnp.any(x != by_hand[path])  # every step leaves the set again
            if not path.endswith("bias"):  # which is free under `clip_weights`
                np.testing.assert_array_equal(weights[path], found["project"][path])
        assert ("optax" in found) == (name in ("box", "l2_ball"))
        for tree in found.values():
            chex.assert_trees_all_close(tree, by_hand, rtol=3e-6, atol=1e-7)
        params = found["project"]


@pytest.mark.parametrize("rule", constrained.RARE)
def test_rare_sets_are_those_of_their_peers(rule):
    heads = {f"attention/{n}/kernel": (8, 2, 4) for n in ("query", "key")}
    trees = {"qk_clip": heads, "redraw": UNITS | {"norm/scale": (4,)}}
    found = {}
    race = contexts.rare(rule, trees.get(rule, {"kernel": (6, 6)}))
    for name in race.makers:  # each of arrays of its own, which it takes over
        arrays = race.draw()
        with jax.numpy_dtype_promotion("standard"):  # which Optax's simplex needs
            contestant = race.makers[name](arrays)
        found[name] = contestant.step(arrays, contestant.own, 0.5)[0].tree
    ours = found.pop("optclip")
    for name, tree in found.items():
        if rule == "redraw":  # other numbers of the same law
            chex.assert_trees_all_equal_shapes_and_dtypes(tree, ours)
            for path in ("up/bias", "norm/scale"):
                np.testing.assert_array_equal(tree[path], ours[path])
        else:
            loose = 0.05 if name == "iterations=10" else 1e-5
            chex.assert_trees_all_close(tree, ours, rtol=loose, atol=loose / 10)


def test_every_context_has_races():
    chosen = suite.choose([])
    entries = contexts.programme(chosen)
    assert {entry.about["context"] for entry in entries} == set(contexts.CONTEXTS)
    skips = [e for e in entries if e.about["context"] == "skip"]
    assert [entry.about["dtype"] for entry in skips] == ["float32", "bfloat16"]
    rounds = {entry.about["context"]: entry.rounds for entry in entries}
    assert (rounds["alone"], rounds["projections"], rounds["sets"]) == (45, 15, 5)


def test_quick_has_every_context_on_few_leaves():
    chosen = suite.choose(["--quick", "--rounds", "2"])
    assert (chosen.scale, chosen.rounds) == (suite.QUICK["scale"], 2)
    entries = contexts.programme(chosen)
    assert {entry.about["context"] for entry in entries} == set(contexts.CONTEXTS)
    for entry in entries:
        assert len(shapes.SETS[entry.about["shapes"]](chosen.scale)) <= 3
        assert entry.rounds <= 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--save", "--quick"], "got another --quick"),
        (["--save", "--scale", "0.5"], "got another --scale"),
        (["--contexts", "skip", "--plot", "x.png"], "--plot draws rules alone"),
        (["--rounds", "0"], "--rounds must be in 1..100, got 0"),
        (["--scale", "-1"], "--scale must be positive, got -1.0"),
        (["--accelerator"], "--accelerator needs --out"),
    ],
)
def test_arguments_that_do_not_fit(words, message, capsys):
    with pytest.raises(SystemExit):
        suite.choose(words)
    assert message in capsys.readouterr().err


def test_some_contexts_can_be_saved():
    words = ["--save", "--contexts", "skip", "projections"]
    assert suite.choose(words).contexts == ["skip", "projections"]


def test_the_bar_says_what_is_compiled_and_ends_full(capsys):
    """Even if a contestant was not installed."""

    def missing(arrays):
        raise ImportError

    race = contexts.alone("clip_by_value", TINY, jnp.float32)
    race.makers.pop("torch")
    race.makers["missing"] = missing
    about = {"shapes": "small", "dtype": "float32", "context": "alone"}
    about["rule"] = "clip_by_value"
    entry = contexts.entry(about, race, scale=0.01, rounds=1)
    said = []
    with Progress(1, entry.seconds) as progress:
        says = progress.says
        progress.says = lambda doing: says(said.append(doing) or doing)
        with progress.race(entry):
            records = suite.run(entry, progress)
    assert [line["name"] for line in records] == [*race.makers][:-1]
    assert said[:2] == ["drawing arrays", "compiling floor: read"]
    assert said[-2:] == ["compiling missing", "in turns"]
    shown = capsys.readouterr().err
    assert "race 1 of 1, small float32 alone clip_by_value: drawing arrays" in shown
    assert "100%" in shown


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (4.4e9, "4.40 GB/s"),
        (45.6e6, "45.6 MB/s"),
        (999.7e3, "1.00 MB/s"),
        (12.0, "12.0 B/s"),
        (0.0, "0.00 µB/s"),
    ],
)
def test_units_suit_the_number(value, said):
    assert report.in_units(value, "B/s") == said


def a_record(context, name, over, **more):
    own = {"shapes": "gpt2", "dtype": "float32", "rule": "-", "context": context}
    timed = {"seconds": 2e-5, "quartiles": [1e-5, 3e-5], "tree_bytes": 4000}
    program = {"temporary_bytes": 40, "trace_seconds": 0.5, "compile_seconds": 1.0}
    ratios = {other: [0.9, ratio, 1.3] for other, ratio in over.items()}
    return own | timed | program | {"name": name, "over": ratios} | more


def some_results(*records):
    return {
        "device": "a CPU",
        "date": "2026-01-01",
        "versions": {"jax": "1"},
        "scale": 1.0,
        "rounds": 45,
        "records": list(records),
    }


def test_the_terminal_explains_its_columns_and_chooses_units():
    record = a_record("projections", "project", {"alone": 1.25, "by hand": 1.1})
    shown = report.terminal(some_results(record | {"rule": "box"}))
    assert "projections: 2026-01-01, jax 1" in shown
    assert "\ngpt2 float32 projections box " in shown
    row = next(line for line in shown.splitlines() if line.startswith("  project "))
    cells = "20.0 µs 10.0 µs – 30.0 µs 200 MB/s 1.25 1.10 1.00 % 1.50 s"
    assert row.split() == ["project", *cells.split()]
    for column in report.WIDTHS:
        assert column == "quartiles" or f"\n{column} " in shown


NEW = some_results(a_record("skip", "optclip skip_step", {"alone": 1.1}))


def test_contexts_that_are_measured_later_replace_their_records():
    clip = a_record("alone", "optclip", {"optax": 1.0})
    stale = a_record("skip", "optclip skip_step", {"alone": 3.0})
    old = some_results(clip, stale)
    same = report.merged(old, NEW)
    assert same == some_results(clip, *NEW["records"])
    assert report.measured(same) == [(["alone", "skip"], "2026-01-01", {"jax": "1"})]
    later = NEW | {"date": "2026-02-02", "versions": {"jax": "2"}}
    both = report.merged(old, later)
    assert both["date"] == "2026-01-01" and both["records"][0] == clip
    of_skip = (["skip"], "2026-02-02", {"jax": "2"})
    assert report.measured(both) == [(["alone"], "2026-01-01", {"jax": "1"}), of_skip]
    assert of_skip in report.measured(report.merged(both, some_results(clip)))
    assert report.merged(some_results(stale), later) == later  # nothing is kept
    with pytest.raises(ValueError, match=r"scale must be 1\.0, got 0\.5"):
        report.merged(old, NEW | {"scale": 0.5})


def test_results_are_saved_beside_those_of_other_contexts(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "ROOT", tmp_path)
    (tmp_path / "results").mkdir()
    report.save(NEW)
    (path,) = report.committed()
    assert path.name == "speed-a-cpu.json" and not path.with_suffix(".png").exists()
    ratios = {"optax": 1.0, "floor": 1.0}
    clip = a_record("alone", "optclip", ratios, rule="clip_by_global_norm")
    report.save(some_results(clip))
    assert [x["context"] for x in report.read(path)["records"]] == ["skip", "alone"]
    assert path.with_suffix(".png").exists()


def test_a_page_has_all_machines_in_one_table():
    """A column for each machine and dtype, and rows of what any of them measured."""
    over = {"project_params": 1.5, "by hand": 1.2, "alone": 1.1}
    records = [
        a_record("projections", name, over, rule="max_norm")
        for name in ("project", "project_params", "keras")
    ]
    wrapped = a_record("skip", "optax apply_if_finite", {"optclip skip_step": 2.0})
    simplex = a_record("sets", "optax", {"optclip": 2.5}, rule="simplex")
    other = NEW | {"device": "another CPU"}
    own = some_results(*records, wrapped, simplex | {"shapes": "matrix"})
    lines = page_table.table(own, other).splitlines()
    norm, hand, keras = "`max_norm`", "1.20 (0.90–1.30) | ", "1.50 (0.90–1.30) | "
    assert lines[0] == "| GPT-2 124M | a CPU, float32 | another CPU, float32 |"
    assert lines[2:] == [
        "| `skip_step` around AdamW over AdamW alone |  | 1.10 (0.90–1.30) |",
        "| Optax's `apply_if_finite` over our `skip_step` | 2.00 (0.90–1.30) |  |",
        "| AdamW + `project` on `max_norm` over AdamW alone | 1.10 (0.90–1.30) |  |",
        f"| AdamW, then `project_params` on {norm}, over the same by hand | {hand} |",
        f"| AdamW, then Keras on {norm}, over `project_params` | {keras} |",
        "| Optax's `simplex` of a matrix 1024 wide over ours | 2.50 (0.90–1.30) |  |",
        "| temporary bytes of `skip_step` around AdamW |  | 1.00 % |",
        "| temporary bytes of Optax's `apply_if_finite` around AdamW | 1.00 % |  |",
        "| temporary bytes of AdamW + `project` on `max_norm` | 1.00 % |  |",
    ]


def test_machines_are_side_by_side_with_their_dates(tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark_tables, "RESULTS", tmp_path)
    ours = a_record("skip", "optclip skip_step", {})
    wrapper = a_record("skip", "optax apply_if_finite", {"optclip skip_step": 2.0})
    own = some_results(a_record("alone", "optclip", {}, rule="clip_by_value"))
    later = some_results(ours, wrapper) | {"date": "2026-02-02"}
    both = report.merged(own, later)
    (tmp_path / "speed-a.json").write_text(report.to_json(both))
    (tmp_path / "speed-b.json").write_text(report.to_json(own | {"device": "b"}))
    gpu = {"device": "gpu", "date": "d", "versions": {"jax": "3"}, "races": {}}
    (tmp_path / "accelerator-c.json").write_text(json.dumps(gpu))
    head, _, *rows = benchmark_tables.side_by_side().splitlines()
    assert head.count(": ms") == 3
    label = "`skip_step` around AdamW (Optax: `apply_if_finite`), float32"
    assert rows == [f"| {label} | 0.02 | 2.00 | – | – | – | – | – | – | – |"]
    assert benchmark_tables.machines().splitlines()[2:] == [
        "| a CPU: alone | 2026-01-01 | jax 1 |",
        "| a CPU: skip | 2026-02-02 | jax 1 |",
        "| b | 2026-01-01 | jax 1 |",
        "| gpu | d | jax 3 |",
    ]


@pytest.mark.parametrize("path", report.committed(), ids=lambda path: path.stem)
def test_committed_numbers_can_be_read(path):
    results = json.loads(path.read_text())
    assert results["records"] and results["versions"]["jax"]
    assert report.terminal(results)


@pytest.mark.parametrize("path", report.committed(), ids=lambda path: path.stem)
def test_the_picture_is_drawn_from_the_committed_numbers(path, tmp_path):
    results = report.read(path)
    timed = any(line["context"] == "alone" for line in results["records"])
    assert path.with_suffix(".png").exists() == timed
    if not timed:
        pytest.skip("a picture shows rules alone, which were not timed here")
    report.draw(results, tmp_path / "speed.png")
    assert (tmp_path / "speed.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_the_page_has_a_column_of_every_device():
    table = page_table.tables()
    for path in report.committed():
        assert f"| {report.read(path)['device']}, float32 |" in table
    (row,) = re.findall(r"^\| `clip_by_global_norm` over its floor.*", table, re.M)
    assert re.search(r"\d\.\d\d \(", row)
