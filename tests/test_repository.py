"""What is built installs and imports; files beside the code say what is true.

The distributions are built without isolation and installed without dependencies, so
that nothing here needs the network: the new environment sees those of this one.
"""

import importlib.metadata
import json
import pathlib
import re
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile

import pytest
import yaml

import optclip

ROOT = pathlib.Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
WORKFLOW = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())
JOBS = WORKFLOW["jobs"]["make"]["strategy"]["matrix"]["include"]
FORMS = sorted((ROOT / ".github/ISSUE_TEMPLATE").glob("[!c]*.yml"))


def run(*command: str | pathlib.Path, cwd: pathlib.Path) -> str:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def python_files(*folders: str) -> set[str]:
    found = (file for folder in folders for file in (ROOT / folder).rglob("*.py"))
    return {file.relative_to(ROOT).as_posix() for file in found}


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> pathlib.Path:
    """A folder with the sdist, and with the wheel that was built from it."""
    folder = tmp_path_factory.mktemp("built")
    options = "--no-isolation", "--outdir", folder
    run(sys.executable, "-m", "build", *options, ROOT, cwd=folder)
    return folder


def test_the_wheel_holds_the_package_and_nothing_else(built):
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    package = {name for name in names if ".dist-info/" not in name}
    assert {x for x in package if x.endswith(".py")} == python_files("optclip")
    assert package - python_files("optclip") == {"optclip/py.typed"}
    assert any(name.endswith("/licenses/LICENSE") for name in names)


def test_the_sdist_holds_what_the_tests_read(built):
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames()}
    assert python_files("optclip", "tests", "examples", "benchmarks") <= names
    data = {*ROOT.glob("*.md"), ROOT / "Makefile", ROOT / "pyproject.toml"}
    data |= {*(ROOT / "tests").rglob("*.json"), *(ROOT / "docs").glob("*.md")}
    data |= {*(ROOT / "benchmarks/results").iterdir(), ROOT / "CITATION.cff"}
    assert {file.relative_to(ROOT).as_posix() for file in data} <= names
    assert not [name for name in names if "__pycache__" in name or ".venv" in name]


def test_the_wheel_installs_and_imports_in_an_empty_environment(built, tmp_path):
    (wheel,) = built.glob("*.whl")
    place = tmp_path / "empty"
    run(sys.executable, "-m", "venv", "--without-pip", place, cwd=tmp_path)
    python = place / "bin" / "python"
    options = "--no-deps", "--no-index", "--quiet"
    install = "-m", "pip", "--python", python, "install", *options, wheel
    run(sys.executable, *install, cwd=tmp_path)
    own = sysconfig.get_path("purelib", vars={"base": str(place)})
    # The line adds the folder only: an editable optclip in it stays unseen.
    dependencies = pathlib.Path(own) / "dependencies.pth"
    dependencies.write_text(sysconfig.get_path("purelib") + "\n")
    program = """
import importlib.metadata, json, optclip
print(json.dumps([optclip.__file__, importlib.metadata.version("optclip"),
    [name for name in optclip.__all__ if not hasattr(optclip, name)]]))
"""
    shown = json.loads(run(python, "-I", "-c", program, cwd=tmp_path))
    assert shown == [f"{own}/optclip/__init__.py", optclip.__version__, []]
    command = run(place / "bin" / "optclip", "advise", "--help", cwd=tmp_path)
    assert "usage: optclip advise" in command


def test_the_classifiers_name_the_releases_of_python_that_are_tested():
    named = {x for x in PROJECT["classifiers"] if re.search(r":: 3\.\d+$", x)}
    tested = {f"Programming Language :: Python :: {job['python']}" for job in JOBS}
    assert named == tested
    assert PROJECT["requires-python"] == ">=3.11"


def test_the_workflow_runs_targets_of_the_makefile():
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M)
    wanted = {job["target"] for job in JOBS}
    assert wanted >= {"lint", "test", "test-oldest", "test-newest", "docs"}
    assert wanted <= set(targets)
    (command,) = [x["run"] for x in WORKFLOW["jobs"]["make"]["steps"] if "run" in x]
    assert command.startswith("make ${{ matrix.target }} ")


def test_the_hooks_are_the_tools_of_make_lint():
    (local,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert local["repo"] == "local"
    tools = {hook["entry"].split()[0] for hook in local["hooks"]}
    assert tools == {".venv/bin/ruff", ".venv/bin/pyright"}
    lint = PROJECT["optional-dependencies"]["lint"]
    assert all(any(re.match(pathlib.Path(x).name, y) for y in lint) for x in tools)


def test_the_citation_is_of_this_release():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["cff-version"] == "1.2.0"
    assert citation["version"] == optclip.__version__
    assert citation["license"] == PROJECT["license"]
    assert {"message", "title", "authors"} <= citation.keys()
    known = {"family-names", "given-names", "name", "orcid", "affiliation"}
    assert all(author and author.keys() <= known for author in citation["authors"])


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.stem)
def test_a_form_has_what_a_form_needs(path):
    form = yaml.safe_load(path.read_text())
    assert form["name"] and form["description"]
    assert all(part["type"] == "textarea" for part in form["body"])
    assert all(part["attributes"]["label"] for part in form["body"])
    identifiers = [part["id"] for part in form["body"]]
    assert len(set(identifiers)) == len(identifiers) >= 1
    assert any(part.get("validations", {}).get("required") for part in form["body"])


def test_the_changelog_knows_this_release():
    assert optclip.__version__ in (ROOT / "CHANGELOG.md").read_text()
    assert importlib.metadata.version("optclip") == optclip.__version__


FRONT = ("README.md", "CONTRIBUTING.md", "docs/upstream.md")


@pytest.mark.parametrize("page", FRONT)
def test_links_lead_to_files(page):
    prose = re.sub(r"```.*?```", "", (ROOT / page).read_text(), flags=re.DOTALL)
    links = re.findall(r"\]\(([^)\s]+)\)", prose)
    assert links
    for link in links:
        if not link.startswith("http"):
            assert ((ROOT / page).parent / link.split("#")[0]).exists(), link
