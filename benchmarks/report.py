"""What the numbers say: the terminal's table, a page's table, the file, the picture.

python -m benchmarks.report      the pages' tables, from the committed numbers
"""

import json
import pathlib
import platform
import re
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from matplotlib.figure import Figure

from benchmarks.timing import Timed

ROOT = pathlib.Path(__file__).parent
Results = dict[str, Any]


def record(
    about: dict[str, str],
    name: str,
    timed: dict[str, Timed],
    size: int,
) -> dict[str, Any]:
    """One contestant's numbers: seconds, ratios within rounds, and of its program."""
    own = timed[name]
    low, middle, high = (float(x) for x in np.quantile(own.seconds, (0.25, 0.5, 0.75)))
    found: dict[str, Any] = about | {
        "name": name,
        "seconds": middle,
        "quartiles": [low, high],
        "tree_bytes": size,
        "over": {
            other: own.over(timed[other].seconds) for other in timed if other != name
        },
    }
    if "floor: read" in timed and not name.startswith("floor"):
        reads = timed["floor: read"].seconds * (passes(about["rule"]) - 2)
        found["over"]["floor"] = own.over(reads + timed["floor: rewrite"].seconds)
    if own.compiled is not None:
        found |= own.compiled._asdict()
    return found


def device() -> str:
    """The device in words."""
    first = jax.devices()[0]
    if first.platform != "cpu":
        return f"{first.device_kind} ({len(jax.devices())})"
    words = [line for line in _cpu_lines() if line.startswith("model name")]
    name = words[0].split(":")[1].strip() if words else platform.processor()
    return f"{name}, {len(words) or 1} cores"


def _cpu_lines() -> list[str]:
    try:
        return pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return []


def to_json(results: Results) -> str:
    """A record a line, so that a change can be read."""
    rest = {key: value for key, value in results.items() if key != "records"}
    lines = ",\n".join(json.dumps(_rounded(line)) for line in results["records"])
    return json.dumps(rest)[:-1] + ', "records": [\n' + lines + "\n]}\n"


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(part) for part in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


REFERENCE = {"learned": "clip_by_global_norm", "sgd": "alone", "adamw": "alone"}


def terminal(results: Results) -> str:
    """Everything measured, a line a contestant."""
    versions = ", ".join(f"{k} {v}" for k, v in results["versions"].items())
    lines = [f"{results['device']}; {versions}; scale {results['scale']}"]
    heads = (
        "ms",
        "quartiles",
        "tree GB/s",
        "/floor",
        "/reference",
        "temp %",
        "trace+compile",
    )
    lines.append(f"{'':64}" + "".join(f"{head:>16}" for head in heads))
    for line in results["records"]:
        key = f"{line['shapes']} {line['dtype']} {line['context']} {line['rule']}"
        over, seconds = line["over"], line["seconds"]
        reference = over.get(REFERENCE.get(line["context"], "optclip"))
        low, high = line["quartiles"]
        timed = line["context"] != "compile"  # of the program, not of its compiler
        cells = [
            f"{1e3 * seconds:.2f}",
            f"{1e3 * low:.1f}–{1e3 * high:.1f}",
            f"{line['tree_bytes'] / seconds / 1e9:.1f}" if timed else "",
            f"{over['floor'][1]:.2f}" if "floor" in over else "",
            f"{reference[1]:.2f}" if reference else "",
        ]
        if "temporary_bytes" in line:
            share = 100 * line["temporary_bytes"] / line["tree_bytes"]
            both = line["trace_seconds"] + line["compile_seconds"]
            cells += [f"{share:.2f}", f"{both:.2f} s"]
        lines.append(
            f"{key[:38]:38} {line['name'][:25]:25}" + "".join(f"{c:>16}" for c in cells)
        )
    return "\n".join(lines)


def find(results: Results, **wanted: str) -> dict[str, Any] | None:
    """The record with these fields."""
    for line in results["records"]:
        if all(line[key] == value for key, value in wanted.items()):
            return line
    return None


def table(results: Results) -> str:
    """A page's table of one device: ratios, medians and in brackets quartiles."""
    of_model = [line for line in results["records"] if line["shapes"] == "gpt2"]
    dtypes = list(dict.fromkeys(line["dtype"] for line in of_model))
    heads = [f"GPT-2 124M on {results['device']}", *dtypes]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for label, wanted, other in _rows():
        cells = [
            _cell(find(results, shapes="gpt2", dtype=dtype, **wanted), other)
            for dtype in dtypes
        ]
        if any(cells):
            lines.append(f"| {' | '.join([label, *cells])} |")
    shares = [_largest_temporary(results, dtype) for dtype in dtypes]
    lines.append(f"| {' | '.join([_TEMPORARY, *shares])} |")
    for shapes, what in (("small", "1000 leaves"), ("equal", "400 leaves")):
        line = find(results, shapes=shapes, context="compile", name="optclip")
        if line:
            label = f"`{line['rule']}` of {what}: trace and compile, over Optax"
            empty = [""] * (len(dtypes) - 1)
            lines.append(f"| {' | '.join([label, _cell(line, 'optax'), *empty])} |")
    return "\n".join(lines)


def _rows() -> Iterator[tuple[str, dict[str, str], str]]:
    """A label, the record that it speaks of, and with whom that is compared."""
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
            yield f"{_NAMES[peer]}'s `{rule}` over ours", wanted, "optclip"
    for rule in ("clip_by_global_norm", "clip_by_block_rms", "adaptive_grad_clip"):
        name = f"optclip {rule}"
        wanted = {"context": "adamw", "name": name}
        yield f"`{rule}` + AdamW over AdamW alone", wanted, "alone"
        wanted = {"context": "adamw", "name": f"optax {rule}"}
        yield f"Optax's `{rule}` + AdamW over ours", wanted, name
    wanted = {"context": "sgd", "name": "keras global_clipnorm"}
    ours = "optclip clip_by_global_norm"
    yield "Keras' SGD with `global_clipnorm` over ours", wanted, ours
    for rule in ("autoclip", "zclip", "adagc", "spike_clip"):
        wanted = {"context": "learned", "name": rule}
        yield f"`{rule}` over `clip_by_global_norm`", wanted, "clip_by_global_norm"
    wanted = {"context": "learned", "name": "clip_by_global_norm"}
    yield "metrics kept over metrics discarded", wanted, "without metrics"


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


_NAMES = {"optax": "Optax", "torch": "PyTorch"}


def _cell(line: dict[str, Any] | None, other: str) -> str:
    if line is None or other not in line["over"]:
        return ""
    low, middle, high = line["over"][other]
    return f"{middle:.2f} ({low:.2f}–{high:.2f})"


def draw(results: Results, path: pathlib.Path) -> None:
    """Times of a call: over the floor of the same rounds, and in milliseconds."""
    timed = [line for line in results["records"] if line["context"] != "compile"]
    dtypes = list(dict.fromkeys(line["dtype"] for line in timed))
    shapes = timed[0]["shapes"]
    figure = Figure(figsize=(12, 3.6 * len(dtypes)), layout="constrained")
    axes = figure.subplots(len(dtypes), 2, squeeze=False)
    for (left, right), dtype in zip(axes, dtypes, strict=True):
        alone = [
            line
            for line in results["records"]
            if (line["shapes"], line["dtype"], line["context"])
            == (shapes, dtype, "alone")
        ]
        rules = list(dict.fromkeys(line["rule"] for line in alone))
        places = np.arange(len(rules))
        for offset, library in enumerate(("optclip", "optax", "torch")):
            lines = [find({"records": alone}, rule=r, name=library) for r in rules]
            at = places + 0.27 * (offset - 1)
            style = {"width": 0.25, "label": library, "color": f"C{offset}"}
            ratios = [line["over"]["floor"][1] if line else np.nan for line in lines]
            times = [1e3 * line["seconds"] if line else np.nan for line in lines]
            for axis, heights in ((left, ratios), (right, times)):
                digits = ".2f" if axis is left else ".0f"
                labels = ["" if np.isnan(x) else f"{x:{digits}}" for x in heights]
                bars = axis.bar(at, heights, **style)
                clear = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}
                axis.bar_label(bars, labels, fontsize="x-small", padding=2, bbox=clear)
        floor = "the floor: the rule's least reads and writes"
        left.axhline(1, color="black", linestyle="--", zorder=0.5, label=floor)
        left.set(
            title=f"{shapes}, {dtype}: time over the floor", ylabel="lower is better"
        )
        right.set(title=f"{shapes}, {dtype}: time of a call", ylabel="ms")
        for axis in (left, right):
            axis.set_ylim(top=1.4 * axis.get_ylim()[1])  # room for the legend
            axis.set_xticks(places, rules, rotation=20, ha="right")
            axis.grid(axis="y", alpha=0.3)
            axis.legend(fontsize="small", ncols=2)
    versions = ", ".join(f"{k} {v}" for k, v in results["versions"].items())
    figure.suptitle(f"{results['device']}; {versions}", fontsize="medium")
    figure.savefig(path, dpi=110)


def draw_races(results: Results, path: pathlib.Path) -> None:
    """The races of an accelerator: the time of a call, a panel a race."""
    races = {
        name: lines
        for name, lines in results["races"].items()
        if all("seconds" in line for line in lines)
    }
    rows = max(-(-len(races) // 2), 1)
    figure = Figure(figsize=(14, 3 * rows), layout="constrained")
    axes = figure.subplots(rows, 2, squeeze=False).ravel()
    for axis, (name, lines) in zip(axes, races.items(), strict=False):
        ours = ["optclip" in line["name"] for line in lines]
        colours = ["tab:blue" if own else "0.7" for own in ours]
        names = [line["name"] for line in lines]
        times = [1e3 * line["seconds"] for line in lines]
        bars = axis.barh(names, times, color=colours)
        rates = [line.get("gigabytes_per_second") for line in lines]
        labels = [
            f"{time:.3g} ms" + (f", {rate:.0f} GB/s" if rate else "")
            for time, rate in zip(times, rates, strict=True)
        ]
        axis.bar_label(bars, labels, padding=3, fontsize="x-small")
        axis.set(title=name, xlabel="ms a call", xlim=(0, 1.4 * max(times)))
        axis.invert_yaxis()
        axis.tick_params(axis="y", labelsize="small")
    for axis in axes[len(races) :]:
        axis.set_visible(False)
    versions = ", ".join(f"{k} {v}" for k, v in results["versions"].items())
    figure.suptitle(f"{results['device']}; {versions}", fontsize="medium")
    figure.savefig(path, dpi=110)


def passes(rule: str) -> int:
    """The least traffic of a clip that clips, in passes over the tree."""
    return {"clip_by_value": 2, "adaptive_grad_clip": 4}.get(rule, 3)


def save(results: Results) -> None:
    """Into benchmarks/results, named by the device."""
    kind = re.sub(r"\W+", "-", results["device"].lower()).strip("-")
    path = ROOT / "results" / f"speed-{kind}"
    path.with_suffix(".json").write_text(to_json(results))
    draw(results, path.with_suffix(".png"))


def tables() -> str:
    """The pages' tables, one a device, from the committed numbers."""
    return "\n\n".join(table(json.loads(path.read_text())) for path in committed())


def committed() -> list[pathlib.Path]:
    """The files of numbers, one a device."""
    return sorted((ROOT / "results").glob("speed-*.json"))


if __name__ == "__main__":
    print(tables())
