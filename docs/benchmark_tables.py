"""The tables of docs/benchmarks.md, from the numbers in benchmarks/results.

    benchmarks/results/*.json ──▶ docs/_generated/*.md, which the page includes

Every number in a table is from there: a new run of the benchmarks changes the page at
the next build. A machine without a number has a dash.
"""

from __future__ import annotations

import json
import pathlib
import sys
from typing import Any, NamedTuple

from benchmarks import page_table, report, spikes

RESULTS = pathlib.Path(__file__).parents[1] / "benchmarks" / "results"
PEERS = {"optax": "Optax", "torch": "PyTorch"}


class Job(NamedTuple):
    """The same work on a CPU (a race of a context) and on an accelerator (a race).

    Attributes:
      label: what it is.
      cpu: which records of `python -m benchmarks`.
      names: of them, by whose they are.
      race: the accelerator's, or "" where it has none.
      racers: of that race, by whose they are.
    """

    label: str
    cpu: dict[str, str]
    names: dict[str, str]
    race: str
    racers: dict[str, str]


LIBRARIES = {name: name for name in ("optclip", *PEERS)}


def jobs() -> list[Job]:
    found = []
    for dtype in ("float32", "bfloat16"):
        own = {"shapes": "gpt2", "dtype": dtype}
        alone = own | {"context": "alone"}
        found.append(
            Job(
                f"`clip_by_global_norm`, {dtype}",
                alone | {"rule": "clip_by_global_norm"},
                LIBRARIES,
                f"one gigabyte, {dtype}",
                {x: f"{x}.clip_by_global_norm, clips" for x in ("optclip", "optax")},
            )
        )
        for rule in ("clip_by_block_rms", "adaptive_grad_clip"):
            racers = {x: f"{x}.{rule}" for x in ("optclip", "optax")}
            race = f"other rules, GPT-2 124M, {dtype}"
            cpu = alone | {"rule": rule}
            found.append(Job(f"`{rule}`, {dtype}", cpu, LIBRARIES, race, racers))
        racers = {
            "optclip": "optclip clip + adamw",
            "optax": "optax clip + adamw",
            "torch": "torch clip + fused adamw",
        }
        found.append(
            Job(
                f"`clip_by_global_norm` and AdamW, {dtype}",
                own | {"context": "adamw"},
                {x: f"{x} clip_by_global_norm" for x in ("optclip", "optax")},
                f"AdamW, GPT-2 124M, {dtype}",
                racers,
            )
        )
        names = {"optclip": "optclip skip_step", "optax": "optax apply_if_finite"}
        label = f"`skip_step` around AdamW (Optax: `apply_if_finite`), {dtype}"
        found.append(Job(label, own | {"context": "skip"}, names, "", {}))
        names = {"optclip": "project_params", "optax": "optax"}
        for rule in ("box", "l2_ball"):
            label = f"AdamW, then `project_params` on `{rule}`, {dtype}"
            cpu = own | {"context": "projections", "rule": rule}
            found.append(Job(label, cpu, names, "", {}))
    return found


def read(pattern: str) -> list[dict[str, Any]]:
    """The results of one kind, of every machine that has some."""
    return [json.loads(file.read_text()) for file in sorted(RESULTS.glob(pattern))]


def side_by_side() -> str:
    """Our milliseconds, and how many times longer each peer takes, by machine.

    Work that no machine has timed is left out.
    """
    machines = read("speed-*.json") + read("accelerator-*.json")
    header, rows = ["what"], [[job.label] for job in jobs()]
    for machine in machines:
        header += [f"{machine['device']}: ms", *(f"{p} ×" for p in PEERS.values())]
        for job, row in zip(jobs(), rows, strict=True):
            seconds = (_on_cpu if "records" in machine else _raced)(machine, job)
            own = seconds.get("optclip")
            row.append(f"{1e3 * own:.3g}" if own else "–")
            for peer in PEERS:
                other = seconds.get(peer)
                row.append(f"{other / own:.2f}" if own and other else "–")
    return table(header, [row for row in rows if {*row[1:]} != {"–"}])


def _on_cpu(machine: dict[str, Any], job: Job) -> dict[str, float]:
    """Seconds by whose; a peer's from the ratio, which is taken within rounds."""
    own = report.find(machine, **job.cpu, name=job.names["optclip"])
    if own is None:
        return {}
    seconds = {"optclip": own["seconds"]}
    for peer in PEERS:
        name = job.names.get(peer, "")
        other = report.find(machine, **job.cpu, name=name)
        if other is not None:
            seconds[peer] = own["seconds"] * other["over"][job.names["optclip"]][1]
    return seconds


def _raced(machine: dict[str, Any], job: Job) -> dict[str, float]:
    lines = {line["name"]: line for line in machine["races"].get(job.race, ())}
    own = lines.get(job.racers.get("optclip", ""))
    if own is None:
        return {}
    seconds = {"optclip": own["seconds"]}
    for peer, name in job.racers.items():
        if peer != "optclip" and name in lines:
            ratio = lines[name]["over"].get(job.racers["optclip"])
            seconds[peer] = own["seconds"] * ratio if ratio else lines[name]["seconds"]
    return seconds


def races() -> str:
    """Every race on every accelerator."""
    parts = []
    header = ["name", "ms a call", "ms the device is busy", "kernels", "GB/s"]
    for machine in read("accelerator-*.json"):
        parts += [f"### {machine['device']}", *machine.get("notes", [])]
        for race, lines in machine["races"].items():
            rows = [
                [
                    line["name"],
                    f"{1e3 * line['seconds']:.3g}",
                    _milliseconds(line.get("busy_seconds")),
                    str(line.get("kernels") or "–"),
                    f"{line['gigabytes_per_second']:.4g}"
                    if line.get("gigabytes_per_second")
                    else "–",
                ]
                for line in lines
            ]
            parts += [f"**{race[0].upper()}{race[1:]}**", table(header, rows)]
    return "\n\n".join(parts)


def _milliseconds(seconds: float | None) -> str:
    return f"{1e3 * seconds:.3g}" if seconds else "–"


def machines() -> str:
    """Each machine with the date and the releases, of some contexts if they differ."""
    rows = []
    for result in read("speed-*.json"):
        parts = report.measured(result)
        for contexts, date, versions in parts:
            of = f": {', '.join(contexts)}" if len(parts) > 1 else ""
            rows.append([f"{result['device']}{of}", date, report.releases(versions)])
    for result in read("accelerator-*.json"):
        releases = report.releases(result["versions"])
        rows.append([result["device"], result["date"], releases])
    return table(["machine", "measured on", "releases"], rows)


def soak() -> str:
    """The long runs, each of other rows of the laws' table."""
    runs = json.loads((RESULTS / "soak.json").read_text())
    header = ["steps", "of them not finite", "spikes", "rules and sets", "traces"]
    rows = [
        [
            f"{sum(run['drawn'].values()):,}",
            f"{run['drawn']['nan'] + run['drawn']['infinity']:,}",
            f"{run['drawn']['spike']:,}",
            str(len(run["rows"])),
            str(run["traces"]),
        ]
        for run in runs
    ]
    return table(header, rows)


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def write(docs: pathlib.Path) -> None:
    """The tables, into docs/_generated."""
    from docs.api_pages import put

    pages = {
        "side_by_side": side_by_side(),
        "machines": machines(),
        "races": races(),
        "cpu": page_table.tables(),
        "spikes": spikes.table(spikes.load()),
        "soak": soak(),
    }
    for name, text in pages.items():
        put(docs / "_generated" / f"{name}.md", text + "\n")


if __name__ == "__main__":  # python -m docs.benchmark_tables FOLDER
    write(pathlib.Path(sys.argv[1]))
