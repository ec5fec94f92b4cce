"""`optclip advise`: the files it reads, its options, its answers and its errors."""

import io
import json
import pathlib
import re
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

import optclip
from optclip.choosing import advise
from optclip.choosing.logs import read_column

NORMS = np.exp(0.2 * np.random.default_rng(0).normal(size=300)).tolist()
FIXED = ["--rules", "clip_by_global_norm(1)"]


def run(capsys: Any, *arguments: str) -> tuple[int, str, str]:
    status = advise.main(["advise", *arguments])
    return status, *capsys.readouterr()


def csv_of(header: str, row: str) -> str:
    return "\n".join([header, *(row.format(i, x) for i, x in enumerate(NORMS))])


LOGS = {
    "a bare column": ("\n".join(map(str, NORMS)), "the only column"),
    "one column with a name": (csv_of("gnorm", "{1}"), "gnorm"),
    "W&B": (
        csv_of(
            '"Step","run - train/grad_norm","run - train/grad_norm__MIN",'
            '"run - train/grad_norm__MAX"',
            '"{0}","{1}","{1}","{1}"',
        ),
        "run - train/grad_norm",
    ),
    "MLflow": (
        csv_of(
            "run_id,key,value,step,timestamp",
            "f00,loss,0.5,{0},17\nf00,grad_norm,{1},{0},17",
        ),
        "grad_norm",
    ),
    "TSV": (csv_of("step\tloss\tgrad norm", "{0}\t3\t{1}"), "grad norm"),
    "JSONL": (
        "\n".join(
            json.dumps({"_step": i, "train": {"loss": 1, "grad_norm": x}})
            for i, x in enumerate(NORMS)
        ),
        "train/grad_norm",
    ),
    "metrics beside the norm": (
        "\n".join(
            json.dumps({"0/size": 2 * x, "0/limit": 1, "0/grad_norm": x}) for x in NORMS
        ),
        "0/grad_norm",
    ),
    "metrics": (
        csv_of("Step,run - clip/limit,run - clip/size", "{0},1,{1}"),
        "run - clip/size",
    ),
    "metrics without a limit": (
        csv_of("step,size,clipped_fraction,batch/size", "{0},{1},0,32"),
        "size",
    ),
    "History.to_csv": (
        csv_of("step,size,limit,clipped,size/a,size/gnorm/b", "{0},{1},1,0,3,4"),
        "size",
    ),
    "trainer_state.json": (
        json.dumps(
            {
                "best_metric": None,
                "log_history": [
                    entry
                    for i, x in enumerate(NORMS)
                    for entry in (
                        {"loss": 1.0, "grad_norm": x, "step": i},
                        {"eval_loss": 1.0, "step": i},
                    )
                ],
            },
            indent=2,
        ),
        "grad_norm",
    ),
    "a list": (json.dumps(NORMS), "the only column"),
}


@pytest.mark.parametrize("kind", LOGS)
def test_every_kind_of_log(kind: str):
    text, name = LOGS[kind]
    column = read_column(io.StringIO(text))
    assert column.name == name
    np.testing.assert_array_equal(column.values, NORMS)


def test_cells():
    """Empty cells are no steps; NaN and infinities are; steps give the order."""
    text = "step,grad_norm,other\n3,1,\n1,,4\n2,NaN,5\n\n0,inf,6\n4,-Infinity,7\n"
    found = read_column(io.StringIO(text)).values
    np.testing.assert_array_equal(found, [np.inf, np.nan, 1, -np.inf])
    assert read_column(io.StringIO(text), "other").values.tolist() == [6, 4, 5, 7]
    strings = '{"grad_norm": "NaN"}\n{"grad_norm": null}\n{"grad_norm": 2}\n'
    np.testing.assert_array_equal(read_column(io.StringIO(strings)).values, [np.nan, 2])


def test_the_answer(tmp_path: pathlib.Path, capsys: Any):
    file = tmp_path / "log.csv"
    file.write_text(LOGS["W&B"][0])
    status, out, err = run(capsys, str(file), "--limit", "9", "--clip-rate", "0.1")
    assert (status, err) == (0, "")
    advice = optclip.suggest(NORMS, 0.1, limit=9.0)
    assert advice.verdict == "never binds" and str(advice) in out
    assert f"{str(file)!r:.0}'run - train/grad_norm', 300 steps" in out
    code = f"clip_by_global_norm({advice.limit:.4g})"
    assert f"In JAX:     optclip.{code}\n" in out
    torch = f"torch.nn.utils.clip_grad_norm_(model.parameters(), {advice.limit:.4g})"
    assert f"In PyTorch: {torch}\n" in out
    rules = re.findall(r"^(\S+\)) +\d", out, re.M)
    usual = [code, "clip_by_global_norm(9)", "spike_clip()", "zclip()"]
    assert rules == [*usual, "quantile_clip(0.95)"]


def test_json_and_standard_input(monkeypatch: Any, capsys: Any):
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(map(str, [*NORMS, "nan"]))))
    rules = "spike_clip, clip_by_value(max_delta=1.5)"
    status, out, _ = run(
        capsys, "-", "--json", "--rules", rules, "--measure", "max_abs"
    )
    found = json.loads(out, parse_constant=lambda name: pytest.fail(name))
    assert status == 0
    advice = optclip.suggest([*NORMS, np.nan], measure=optclip.measures.max_abs)
    for field in ("limit", "low", "high", "verdict", "text", "clip_rate"):
        assert found[field] == getattr(advice, field)
    assert found["rule"] == advice.code == f"optclip.clip_by_value({advice.limit:.4g})"
    assert "clip_grad_value_(" in found["pytorch"]
    assert found["evidence"]["nonfinite"] == 1
    assert list(found["replay"]) == ["spike_clip", "clip_by_value(max_delta=1.5)"]
    value = optclip.replay([*NORMS, np.nan], {"v": optclip.clip_by_value(1.5)})["v"]
    numbers = found["replay"]["clip_by_value(max_delta=1.5)"]
    assert numbers["clip_rate"] == value.clip_rate
    assert (numbers["limit"], numbers["nonfinite"]) == (1.5, 1)


def test_a_long_log_replays_its_end(
    tmp_path: pathlib.Path, capsys: Any, monkeypatch: Any
):
    monkeypatch.setattr(advise, "REPLAYED", 100)
    monkeypatch.setattr(advise, "PROGRESS", 120)
    file = tmp_path / "log.txt"
    file.write_text(LOGS["a bare column"][0])
    _, out, err = run(capsys, str(file), *FIXED)
    assert "300 steps; the table is of the last 100\n" in out
    assert out.splitlines()[2].startswith("100 steps, ")
    assert err.splitlines() == [
        "optclip advise: 120 lines read",
        "optclip advise: 240 lines read",
        "optclip advise: replaying 100 of 300 steps under 1 rules",
    ]


@pytest.mark.parametrize(
    "command",
    [
        ["-m", "optclip"],
        ["-c", "from optclip.__main__ import main; raise SystemExit(main())"],
    ],
)
def test_as_a_program(command: list[str]):
    done = subprocess.run(
        [sys.executable, *command, "advise", "-", *FIXED],
        input=LOGS["JSONL"][0],
        cwd=pathlib.Path(optclip.__file__).parent.parent,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "-: 'train/grad_norm', 300 steps" in done.stdout


def test_the_console_script_is_declared():
    import tomllib

    text = (pathlib.Path(optclip.__file__).parent.parent / "pyproject.toml").read_text()
    assert tomllib.loads(text)["project"]["scripts"] == {
        "optclip": "optclip.__main__:main"
    }


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("a,b\n1,2\n", ["--column", "c"], "column must be one of 'a', 'b', got 'c'"),
        ("a,b\n1,2\n", [], "column must be named .* got None among 'a', 'b'"),
        (
            "a/size,a/limit,b/size,b/limit\n1,2,3,4\n",
            [],
            "column must be named .* got None among 'a/size'",
        ),
        ("\n".join(map(str, NORMS[:49])), [], "at least 50 steps, got 49"),
        ("nan\n" * 60, [], "must have finite numbers, got none in 60 steps"),
        ("0\n" * 60, [], "10 of them finite and above 0, got 60 and 0"),
        ("-1\n" * 60, [], "sizes must be non-negative .* got -1.0 at step 0"),
        ("", [], "column must be named"),
        ("1,2\n3,4\n", [], "must have a header .* got '1' first"),
        ("grad_norm\nabc\n", [], "'grad_norm' must hold numbers, got 'abc' in row 1"),
        ('{"grad_norm": true}\n', [], "must hold numbers, got True in row 1"),
        ('{"grad_norm": 1\n', [], "file must be JSON, got '{\"grad_norm\": 1'"),
        (
            "run_id,key,value\n1,grad_norm,2\n2,grad_norm,3\n",
            [],
            "file must hold one run, got 2",
        ),
        (LOGS["a list"][0], ["--rules", "spike"], "such as 'spike_clip', got 'spike'"),
        (
            LOGS["a list"][0],
            ["--rules", "zclip(q=1)"],
            "calls that rules take, got .*'q'",
        ),
        (LOGS["a list"][0], ["--rules", "zclip("], "names or calls of rules"),
        (LOGS["a list"][0], ["--rules", "zclip, zclip"], "must be different"),
        (LOGS["a list"][0], ["--rules", "clip(-1)"], "max_delta must be non-negative"),
        (LOGS["a list"][0], ["--clip-rate", "2"], r"clip_rate must be in \[0, 1\]"),
    ],
)
def test_errors(
    text: str, options: list[str], message: str, tmp_path: pathlib.Path, capsys: Any
):
    file = tmp_path / "log"
    file.write_text(text)
    status, out, err = run(capsys, str(file), *options)
    assert (status, out) == (2, "")
    assert re.match(f"optclip advise: .*{message}", err), err
    assert err.count("\n") == 1


def test_files_that_cannot_be_opened(tmp_path: pathlib.Path, capsys: Any):
    log = tmp_path / "log"
    nowhere = str(tmp_path / "none" / "advice.png")
    assert run(capsys, str(log))[2].startswith("optclip advise: [Errno 2] No such file")
    log.write_text(LOGS["a bare column"][0])
    status, out, err = run(capsys, str(log), *FIXED, "--plot", nowhere)
    assert (status, out) == (2, "")
    assert err.startswith("optclip advise: [Errno 2] No such file")


def test_a_picture(tmp_path: pathlib.Path, capsys: Any):
    log, file = tmp_path / "log", tmp_path / "advice.png"
    log.write_text(LOGS["a bare column"][0])
    status, _, err = run(capsys, str(log), *FIXED, "--plot", str(file))
    assert (status, err) == (0, "")
    assert file.read_bytes().startswith(b"\x89PNG")


def test_json_of_a_run_that_diverges(monkeypatch: Any, capsys: Any):
    rising = "\n".join(str(1.05**step) for step in range(300))
    monkeypatch.setattr("sys.stdin", io.StringIO(rising))
    status, out, _ = run(capsys, "-", "--json", *FIXED)
    assert status == 0 and json.loads(out)["evidence"]["diverges"] is True


@pytest.mark.parametrize("wanted", [None, "grad_norm"])
def test_a_column_may_begin_after_other_numbers(wanted: str | None):
    rows = [json.dumps({"accuracy": x}) for x in range(1500)]
    rows += [json.dumps({"grad_norm": x}) for x in NORMS]
    assert read_column(rows, wanted).values.tolist() == NORMS


def test_a_norm_may_begin_after_another_size():
    rows = "\n".join(f"32,{x if n >= 1000 else ''}" for n, x in enumerate(NORMS * 20))
    column = read_column(io.StringIO(f"batch/size,grad_norm\n{rows}\n"))
    lines = [json.dumps({"batch/size": 32})] * 1001 + [json.dumps({"grad_norm": 2.0})]
    assert column.name == "grad_norm"
    assert read_column(io.StringIO("\n".join(lines))).name == "grad_norm"


def test_blank_cells_are_steps_without_a_log():
    rows = ["step, grad_norm", "1, 2.5", "2, ", "3, 3.5", " , 4.5"]
    assert read_column(rows).values.tolist() == [2.5, 3.5, 4.5]


def test_a_cell_that_never_ends(monkeypatch: Any, capsys: Any):
    monkeypatch.setattr("sys.stdin", io.StringIO('a,b\n"' + 200_000 * "1"))
    status, _, err = run(capsys, "-")
    assert status == 2 and "field" in err
