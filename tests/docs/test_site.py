"""The site: a page for every public name, a picture for every part, no dead link.

Sphinx builds it (`make docs`); what is here needs nothing but the library.
"""

import json
import pathlib
import re

import pytest

import optclip
from docs import api_pages, benchmark_tables, gallery

ROOT = pathlib.Path(__file__).parents[2]
DOCS = ROOT / "docs"


@pytest.fixture(scope="module")
def api(tmp_path_factory):
    """The pages of the API by name."""
    folder = tmp_path_factory.mktemp("docs")
    api_pages.write(folder)
    return {file.name: file.read_text() for file in (folder / "api").iterdir()}


def test_every_public_name_has_a_page(api):
    for place in ("", *api_pages.NAMESPACES):
        module = api_pages.namespace(place)
        index = api[f"{place}.md" if place else "index.md"]
        for name in module.__all__:
            full = f"{module.__name__}.{name}"
            if full in api_pages.public():
                page = f"{api_pages.page(full)}.rst"
                assert f":: {name}\n" in api[page]
                assert f"({page})" in index, full
            else:
                assert f"{full.removeprefix('optclip.')}.md" in api, full


def test_every_namespace_is_in_the_api():
    packages = {
        module.__name__.removeprefix("optclip.")
        for place in ("", "initializers")
        for module in vars(api_pages.namespace(place)).values()
        if getattr(module, "__name__", "").startswith("optclip.")
        and module.__name__.rpartition(".")[2] in api_pages.namespace(place).__all__
        and hasattr(module, "__all__")
    }
    assert packages == set(api_pages.NAMESPACES)


def test_pages_differ_on_disks_that_ignore_case():
    pages = [api_pages.page(name).lower() for name in api_pages.public()]
    assert len(set(pages)) == len(pages)


def test_a_name_without_a_docstring_is_found(monkeypatch):
    assert api_pages.undocumented() == []

    def silent():
        pass

    monkeypatch.setitem(api_pages.public(), "optclip.silent", silent)
    assert api_pages.undocumented() == ["optclip.silent"]


def test_every_rule_has_a_picture():
    rules = [
        rows
        for heading, rows in api_pages.groups().items()
        if heading.startswith("Rules ")
    ]
    names = [name for rows in rules for name, _ in rows]
    assert names and set(names) == set(gallery.RULES)


@pytest.mark.parametrize(
    ("place", "heading", "entries"),
    [("sets", "set", gallery.SETS), ("initializers", "preset", gallery.PRESETS)],
)
def test_every_set_and_preset_has_a_picture(place, heading, entries):
    names = api_pages.table(place, heading)
    assert names and set(names) == set(entries)


def test_the_code_of_an_entry_names_the_entry():
    for place, entries in gallery.KINDS.items():
        for name in entries:
            code = gallery.text(place, name).split("```python\n")[1].split("```")[0]
            assert f"{name}(" in code
            compile(code, name, "exec")


def test_a_rule_lets_through_what_the_picture_shows():
    norms = gallery.stream()
    out, limits = gallery.run("clip_by_norm", gallery.RULES["clip_by_norm"], norms)
    assert (limits == 2.5).all() and (out <= 2.5 * (1 + 1e-6)).all()
    assert (out[norms < 2.5] == norms[norms < 2.5]).all() and (norms > 2.5).any()


def test_docstrings_become_restructuredtext():
    lines = [
        "Sizes |x| of `box`, see [a paper](https://a.org).",
        "",
        "    y = |x|",
        "",
        "Args:",
        "  x: as in `sets.box`, or `x`s.",
        "",
        "Edge cases: a zero",
        "stays.",
        "",
        "Metrics: two keys:",
        "  a/size, a/limit: of `x`",
        "    at last.",
        "",
        ">>> f(1)",
        "1",
    ]

    def f(x):
        return x

    api_pages.as_rst(None, "function", "optclip.sets.f", f, None, lines)
    assert lines == [
        r"Sizes \|x\| of :py:obj:`box <optclip.sets.box>`, see `a paper <https://a.org>`__.",
        "",
        ".. code-block:: text",
        "",
        "    y = |x|",
        "",
        "Args:",
        "  x: as in :py:obj:`sets.box <optclip.sets.box>`, or ``x``\\ s.",
        "",
        ".. rubric:: Edge cases",
        "",
        "A zero stays.",
        "",
        ".. rubric:: Metrics",
        "",
        "Two keys:",
        "",
        "* ``a/size, a/limit``: of ``x``",
        "  at last.",
        "",
        ".. rubric:: Example",
        "",
        ">>> f(1)",
        "1",
    ]


def test_signatures_name_their_aliases():
    given = "(max_norm: TypeAliasForwardRef('Limit') | None = None)"
    back = api_pages.signature(None, "", "", None, None, given, None)
    assert back == ("(max_norm: Limit | None = None)", None)


def test_benchmarks_are_the_committed_numbers():
    table = benchmark_tables.side_by_side()
    (file,) = benchmark_tables.RESULTS.glob("speed-amd-*.json")
    records = json.loads(file.read_text())["records"]
    (seconds,) = (
        line["seconds"]
        for line in records
        if line["name"] == "optclip"
        and line["rule"] == "adaptive_grad_clip"
        and line["dtype"] == "bfloat16"
        and line["shapes"] == "gpt2"
        and line["context"] == "alone"
    )
    (row,) = (
        line for line in table.splitlines() if "`adaptive_grad_clip`, bfloat16" in line
    )
    assert f"| {1e3 * seconds:.3g} |" in row


MADE = ("api/", "gallery/", "_generated/")  # by the build, which checks links to them
PROGRAM = re.compile(r"^```.*?^```|`[^`\n]*`", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)]*)?\)")


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(file, id=str(file.relative_to(ROOT)))
        for file in (*ROOT.glob("*.md"), *DOCS.rglob("*.md"))
        if not str(file.relative_to(ROOT)).startswith(
            tuple(f"docs/{folder}" for folder in (*MADE, "_build/"))
        )
    ],
)
def test_relative_links_lead_somewhere(page):
    for link in LINK.findall(PROGRAM.sub("", page.read_text())):
        if "://" in link or link.startswith("mailto:"):
            continue
        target = (page.parent / link).resolve()
        made = target.is_relative_to(DOCS) and str(target.relative_to(DOCS)).startswith(
            MADE
        )
        assert made or target.exists(), link


def test_the_home_page_says_what_the_library_is():
    _, _, text = (DOCS / "index.md").read_text().partition("# optclip\n\n")
    assert text.startswith(
        "optclip clips gradients, constrains weights and initializes models in JAX."
    )
    assert optclip.__doc__ is not None
