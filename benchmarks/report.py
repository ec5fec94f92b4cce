"""What the numbers say: the terminal's table, the file, the picture."""

import json
import pathlib
import platform
import re
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


REFERENCE = {
    "learned": "clip_by_global_norm",
    "sgd": "alone",
    "adamw": "alone",
    "skip": "alone",
    "projections": "alone",
}
LEGEND = """\
time         of a call, the median; quartiles beside it
rate         bytes of the tree (gradients or parameters) over the time
/floor       over the time to read the tree as often as the rule must and rewrite it
             once (`floor: read` and `floor: rewrite`), in the same rounds
/reference   over optclip, in the same rounds; in the context learned over
             clip_by_global_norm, beside an optimizer over the optimizer alone
/by hand     over the same in a line of JAX each, in the same rounds
temporary    bytes that the program allocates and frees, of those of the tree
compile      to trace and compile the program; what is timed in the context compile"""
WIDTHS = {
    "time": 10,
    "quartiles": 18,
    "rate": 11,
    "/floor": 8,
    "/reference": 12,
    "/by hand": 10,
    "temporary": 11,
    "compile": 9,
}


def terminal(results: Results) -> str:
    """Everything measured, a line a contestant, and what the columns mean."""
    lines = [f"{results['device']}; scale {results['scale']}"]
    lines += [
        f"{', '.join(contexts)}: {date}, {releases(versions)}"
        for contexts, date, versions in measured(results)
    ]
    heads = "".join(f"{head:>{width}}" for head, width in WIDTHS.items())
    race = ""
    for line in results["records"]:
        words = (line[key] for key in ("shapes", "dtype", "context", "rule"))
        key = " ".join(word for word in words if word != "-")
        if key != race:
            lines += ["", f"{key:48}{heads}"]
        race = key
        cells = zip(_cells(line), WIDTHS.values(), strict=True)
        row = "".join(f"{cell:>{width}}" for cell, width in cells)
        lines.append(f"  {line['name']:46}{row}".rstrip())
    return "\n".join([*lines, "", LEGEND])


def _cells(line: dict[str, Any]) -> list[str]:
    """Of one contestant, column by column."""
    over, seconds = line["over"], line["seconds"]
    reference = REFERENCE.get(line["context"], "optclip")
    timed = line["context"] != "compile"  # of the program, not of its compiler
    cells = [
        in_units(seconds, "s"),
        " – ".join(in_units(x, "s") for x in line["quartiles"]),
        in_units(line["tree_bytes"] / seconds, "B/s") if timed else "",
    ]
    for other in ("floor", reference, "by hand"):
        cells.append(f"{over[other][1]:.2f}" if other in over else "")
    if "temporary_bytes" not in line:
        return [*cells, "", ""]
    both = line["trace_seconds"] + line["compile_seconds"]
    return [*cells, temporary(line), in_units(both, "s")]


UNITS = [(1e9, "G"), (1e6, "M"), (1e3, "k"), (1.0, ""), (1e-3, "m"), (1e-6, "µ")]


def in_units(value: float, unit: str) -> str:
    """Three digits, with the prefix that leaves one to three before the point."""
    large = (entry for entry in UNITS if value >= 0.9995 * entry[0])
    power, prefix = next(large, UNITS[-1])
    number = value / power
    digits = 2 if number < 9.995 else 1 if number < 99.95 else 0
    return f"{number:.{digits}f} {prefix}{unit}"


def temporary(line: dict[str, Any]) -> str:
    """The temporary bytes in percent of the tree's."""
    return f"{100 * line['temporary_bytes'] / line['tree_bytes']:.2f} %"


def releases(versions: dict[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items())


def measured(results: Results) -> list[tuple[list[str], str, dict[str, str]]]:
    """Which contexts were measured on which date, with which releases."""
    found: list[tuple[list[str], str, dict[str, str]]] = []
    for line in results["records"]:
        own = results | line.get("measured", {})
        for contexts, *rest in found:
            if rest == [own["date"], own["versions"]]:
                if line["context"] not in contexts:
                    contexts.append(line["context"])
                break
        else:
            found.append(([line["context"]], own["date"], own["versions"]))
    return found


def find(results: Results, **wanted: str) -> dict[str, Any] | None:
    """The record with these fields."""
    for line in results["records"]:
        if all(line[key] == value for key, value in wanted.items()):
            return line
    return None


def draw(results: Results, path: pathlib.Path) -> None:
    """Times of a call: over the floor of the same rounds, and in milliseconds."""
    timed = [line for line in results["records"] if line["context"] == "alone"]
    dtypes = list(dict.fromkeys(line["dtype"] for line in timed))
    shapes = timed[0]["shapes"]
    figure = Figure(figsize=(12, 3.6 * len(dtypes)), layout="constrained")
    axes = figure.subplots(len(dtypes), 2, squeeze=False)
    for (left, right), dtype in zip(axes, dtypes, strict=True):
        alone = [
            line for line in timed if (line["shapes"], line["dtype"]) == (shapes, dtype)
        ]
        rules = list(dict.fromkeys(line["rule"] for line in alone))
        places = np.arange(len(rules))
        for offset, library in enumerate(("optclip", "optax", "torch")):
            lines = [find({"records": alone}, rule=r, name=library) for r in rules]
            if not any(lines):
                continue  # a peer that was not installed
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
    (own,) = (about for at, _, about in measured(results) if "alone" in at)
    heading = f"{results['device']}; {releases(own)}"
    figure.suptitle(heading, fontsize="medium")
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
    heading = f"{results['device']}; {releases(results['versions'])}"
    figure.suptitle(heading, fontsize="medium")
    figure.savefig(path, dpi=110)


def passes(rule: str) -> int:
    """The least traffic of a clip that clips, in passes over the tree."""
    return {"clip_by_value": 2, "adaptive_grad_clip": 4}.get(rule, 3)


def save(results: Results) -> None:
    """Into benchmarks/results, named by the device."""
    kind = re.sub(r"\W+", "-", results["device"].lower()).strip("-")
    path = ROOT / "results" / f"speed-{kind}.json"
    if path.exists():
        results = merged(read(path), results)
    path.write_text(to_json(results))
    if any(line["context"] == "alone" for line in results["records"]):
        draw(results, path.with_suffix(".png"))


def merged(old: Results, new: Results) -> Results:
    """The old numbers, but those of the contexts that were measured again.

    Where the date, the releases or the rounds are others than those of the old numbers,
    each new record says its own, as `measured`.
    """
    renewed = {line["context"] for line in new["records"]}
    kept = [line for line in old["records"] if line["context"] not in renewed]
    if not kept:
        return new
    if old["scale"] != new["scale"]:
        raise ValueError(f"scale must be {old['scale']}, got {new['scale']}.")
    about = ("date", "versions", "rounds")
    other = {key: new[key] for key in about if new[key] != old[key]}
    added = [line | {"measured": other} if other else line for line in new["records"]]
    return old | {"records": kept + added}


def read(path: pathlib.Path) -> Results:
    return json.loads(path.read_text())


def committed() -> list[pathlib.Path]:
    """The files of numbers, one a CPU."""
    return sorted((ROOT / "results").glob("speed-*.json"))
