"""The pages' table: ratios of every machine whose numbers are committed.

python -m benchmarks.page_table
"""

from collections.abc import Iterator
from typing import Any

from benchmarks import report
from benchmarks.report import Results

Row = tuple[str, dict[str, str], str]  # a label, the record, with whom to compare it
PEERS = {"optax": "Optax", "torch": "PyTorch", "keras": "Keras"}


def table(*machines: Results) -> str:
    """Medians and in brackets quartiles, a column for each machine and dtype.

    A machine without a number has an empty cell; a row without any is left out.
    """
    columns = [(results, dtype) for results in machines for dtype in _dtypes(results)]
    heads = [f"{results['device']}, {dtype}" for results, dtype in columns]
    lines = [f"| GPT-2 124M | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
    for label, wanted, other in _rows():
        found = [_find(*column, wanted) for column in columns]
        lines += _line(label, [_ratio(line, other) for line in found])
    lines += _line(_TEMPORARY, [_largest_temporary(*column) for column in columns])
    for label, wanted in _temporaries():
        found = [_find(*column, wanted) for column in columns]
        lines += _line(
            label, [report.temporary(line) if line else "" for line in found]
        )
    return "\n".join(lines)


def _dtypes(results: Results) -> list[str]:
    return list(dict.fromkeys(line["dtype"] for line in results["records"]))


def _find(
    results: Results, dtype: str, wanted: dict[str, str]
) -> dict[str, Any] | None:
    """A record; of GPT-2 unless it is told otherwise."""
    return report.find(results, **({"shapes": "gpt2", "dtype": dtype} | wanted))


def _line(label: str, cells: list[str]) -> list[str]:
    return [f"| {' | '.join([label, *cells])} |"] if any(cells) else []


def _ratio(line: dict[str, Any] | None, other: str) -> str:
    if line is None or other not in line["over"]:
        return ""
    low, middle, high = line["over"][other]
    return f"{middle:.2f} ({low:.2f}–{high:.2f})"


def _rows() -> Iterator[Row]:
    yield from _alone()
    yield from _steps()
    yield from _projections()
    yield from _sets()
    for shapes, rule, leaves in (
        ("small", "clip_by_global_norm", 1000),
        ("equal", "clip_by_block_rms", 400),
    ):
        wanted = {"shapes": shapes, "context": "compile", "name": "optclip"}
        label = f"`{rule}` of {leaves} leaves: trace and compile, over Optax"
        yield label, wanted, "optax"


def _alone() -> Iterator[Row]:
    for rule in ("clip_by_global_norm", "adaptive_grad_clip"):
        wanted = {"context": "alone", "rule": rule, "name": "optclip"}
        yield f"`{rule}` over its floor", wanted, "floor"
    for peer in ("optax", "torch"):
        for rule in (
            "clip_by_global_norm",
            "clip_by_block_rms",
            "clip_by_value",
            "adaptive_grad_clip",
        ):
            wanted = {"context": "alone", "rule": rule, "name": peer}
            yield f"{PEERS[peer]}'s `{rule}` over ours", wanted, "optclip"
    for rule in ("autoclip", "zclip", "adagc", "spike_clip"):
        wanted = {"context": "learned", "name": rule}
        yield f"`{rule}` over `clip_by_global_norm`", wanted, "clip_by_global_norm"
    wanted = {"context": "learned", "name": "clip_by_global_norm"}
    yield "metrics kept over metrics discarded", wanted, "without metrics"


def _steps() -> Iterator[Row]:
    """Whole steps, behind a clip or within what drops bad ones."""
    for rule in ("clip_by_global_norm", "clip_by_block_rms", "adaptive_grad_clip"):
        name = f"optclip {rule}"
        wanted = {"context": "adamw", "name": name}
        yield f"`{rule}` + AdamW over AdamW alone", wanted, "alone"
        wanted = {"context": "adamw", "name": f"optax {rule}"}
        yield f"Optax's `{rule}` + AdamW over ours", wanted, name
    wanted = {"context": "sgd", "name": "keras global_clipnorm"}
    ours = "optclip clip_by_global_norm"
    yield "Keras' SGD with `global_clipnorm` over ours", wanted, ours
    ours = "optclip skip_step"
    skip = {"context": "skip", "name": ours}
    yield "`skip_step` around AdamW over AdamW alone", skip, "alone"
    label = "`skip_step` around AdamW over `clip_by_global_norm` + AdamW"
    yield label, skip, "optclip clip_by_global_norm"
    wanted = {"context": "skip", "name": "optax apply_if_finite"}
    yield "Optax's `apply_if_finite` over our `skip_step`", wanted, ours


def _projections() -> Iterator[Row]:
    """Steps of AdamW whose parameters end in a set."""
    context = {"context": "projections"}
    wanted = context | {"rule": "box", "name": "clip_weights"}
    yield "AdamW + `clip_weights` over AdamW alone", wanted, "alone"
    for rule in SETS:
        own = context | {"rule": rule}
        label = f"AdamW + `project` on `{rule}` over AdamW alone"
        yield label, own | {"name": "project"}, "alone"
        label = f"AdamW, then `project_params` on `{rule}`, over the same by hand"
        yield label, own | {"name": "project_params"}, "by hand"
        for peer in ("optax", "keras"):
            label = f"AdamW, then {PEERS[peer]} on `{rule}`, over `project_params`"
            yield label, own | {"name": peer}, "project_params"


SETS = ("box", "max_norm", "unit_norm", "l2_ball")


def _sets() -> Iterator[Row]:
    """Rarely used projections, of a matrix or a layer, and `redraw`."""
    context = {"context": "sets", "shapes": "matrix"}
    ball = context | {"rule": "spectral_ball"}
    label = "`spectral_ball` of a matrix 1024 wide over the same by hand"
    yield label, ball | {"name": "optclip"}, "by hand"
    label = "`spectral_ball(iterations=10)` of it over `spectral_ball`"
    yield label, ball | {"name": "iterations=10"}, "optclip"
    for rule in ("simplex", "l1_ball"):
        label = f"Optax's `{rule}` of a matrix 1024 wide over ours"
        yield label, context | {"rule": rule, "name": "optax"}, "optclip"
    for shapes, rule, label in (
        ("attention", "qk_clip", "`qk_clip` of a layer 1024 wide"),
        ("gpt2", "redraw", "`redraw`"),
    ):
        wanted = {"context": "sets", "shapes": shapes, "rule": rule, "name": "optclip"}
        yield f"{label} over the same by hand", wanted, "by hand"


_TEMPORARY = "temporary bytes, the largest of these rules, of the gradients'"


def _largest_temporary(results: Results, dtype: str) -> str:
    """In percent; beside an optimizer, its own would count."""
    shares = [
        line["temporary_bytes"] / line["tree_bytes"]
        for line in results["records"]
        if line["shapes"] == "gpt2" and line["dtype"] == dtype
        if line["context"] == "alone" and line["name"] == "optclip"
    ]
    return f"{100 * max(shares):.2f} %" if shares else ""


def _temporaries() -> Iterator[tuple[str, dict[str, str]]]:
    """Labels, and the records whose temporary bytes are told."""
    for name, label in (
        ("optclip skip_step", "`skip_step` around AdamW"),
        ("optax apply_if_finite", "Optax's `apply_if_finite` around AdamW"),
    ):
        yield f"temporary bytes of {label}", {"context": "skip", "name": name}
    for rule in SETS:
        wanted = {"context": "projections", "rule": rule, "name": "project"}
        yield f"temporary bytes of AdamW + `project` on `{rule}`", wanted


def tables() -> str:
    """Of all machines, from the committed numbers."""
    return table(*map(report.read, report.committed()))


if __name__ == "__main__":
    print(tables())
