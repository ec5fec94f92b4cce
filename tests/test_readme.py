"""README's programs run, and print what README says."""

from tests import pages


def test_programs_print_what_the_readme_says():
    pages.run("README.md")
