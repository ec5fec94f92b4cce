"""docs/papers.md and references.bib hold the source of every public name that has one.

A source is a link in a docstring to arXiv, a publisher, or the page of a program. The
table of the page is what `table` makes of the docstrings and the bibliography.
"""

import importlib
import inspect
import re

import pytest

from tests import pages

BIBLIOGRAPHY = (pages.ROOT / "docs/references.bib").read_text()
PAGE = (pages.ROOT / "docs/papers.md").read_text()
ENTRY = re.compile(r"^@(\w+)\{(\w+),\n(.*?)^\}$", re.DOTALL | re.MULTILINE)
FIELD = re.compile(r"^  (\w+) = \{(.*)\},$", re.MULTILINE)
LINK = re.compile(r"https://[^\s)]+[^\s).,;]")
NAMESPACES = ("", "thresholds", "actions", "sets", "initializers")
# Documentation, which is no source: what a name resembles, not where it comes from.
MANUALS = (
    "https://docs.jax.dev",
    "https://docs.pytorch.org",
    "https://keras.io/api",
    "https://flax.readthedocs.io",
)

ENTRIES = {
    key: {"kind": kind, **dict(FIELD.findall(body))}
    for kind, key, body in ENTRY.findall(BIBLIOGRAPHY)
}


def link(entry: dict[str, str]) -> str:
    if "eprint" in entry:
        return f"https://arxiv.org/abs/{entry['eprint']}"
    return f"https://doi.org/{entry['doi']}" if "doi" in entry else entry["url"]


def identity(url: str) -> str:
    """A link without the publisher's front: one paper has several addresses."""
    return re.sub(r"https://(dl\.acm\.org/doi|doi\.org)/", "doi:", url)


KEYS = {identity(link(entry)): key for key, entry in ENTRIES.items()}


def sources() -> dict[str, list[str]]:
    """The links in the docstring of each public function."""
    found = {}
    for place in NAMESPACES:
        module = importlib.import_module(f"optclip.{place}".rstrip("."))
        for name in module.__all__:
            value = getattr(module, name)
            if inspect.isfunction(value):
                links = LINK.findall(inspect.getdoc(value) or "")
                papers = [url for url in links if not url.startswith(MANUALS)]
                if papers:
                    found[f"{module.__name__}.{name}"] = papers
    return found


def cited(key: str) -> str:
    """Such as `Brock et al. 2021`, without TeX's accents."""
    entry = ENTRIES[key]
    people = entry["author"].split(" and ")
    first = plain(people[0]).split(",")[0]
    second = plain(people[1]).split(",")[0] if len(people) == 2 else ""
    many = " et al." if len(people) > 2 or second == "others" else ""
    both = f" and {second}" if second and not many else ""
    return f"{first}{both}{many} {entry['year']}"


def plain(text: str) -> str:
    return re.sub(r"\{\\['\"cv]\{?(\w)\}?\}|[{}]", r"\1", text)


def table() -> str:
    rows = ["| name | source | title | BibTeX key |", "|---|---|---|---|"]
    for name, links in sources().items():
        short = name.removeprefix("optclip.")
        for url in dict.fromkeys(links):
            key = KEYS[identity(url)]
            entry = ENTRIES[key]
            rows.append(
                f"| [`{short}`](api/{name}.rst) | [{cited(key)}]({link(entry)}) |"
                f" {plain(entry['title'])} | `{key}` |"
            )
    return "\n".join(rows).replace("$\\ell_1$", "l1").replace("---with", " – with")


def test_every_source_has_an_entry():
    missing = {
        name: [url for url in links if identity(url) not in KEYS]
        for name, links in sources().items()
    }
    assert not any(missing.values()), missing


def test_the_page_has_them_all():
    assert table() in PAGE, f"the table is to be\n{table()}"


def test_every_entry_is_somebody_s_source():
    cited_ones = {KEYS[identity(url)] for links in sources().values() for url in links}
    assert set(ENTRIES) == cited_ones


@pytest.mark.parametrize("key", ENTRIES)
def test_an_entry_is_whole(key):
    entry = ENTRIES[key]
    assert {"title", "author", "year"} <= set(entry)
    assert len({"eprint", "doi", "url"} & set(entry)) == 1
    assert ("archivePrefix" in entry) == ("eprint" in entry)
    if "eprint" in entry:  # not later than the first version by more than three years
        first = 2000 + int(entry["eprint"][:2])
        assert 0 <= int(entry["year"]) - first <= 3
    assert list(ENTRIES) == sorted(ENTRIES)
    assert BIBLIOGRAPHY.count("@") == len(ENTRIES)
