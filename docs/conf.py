"""How Sphinx builds the site: `make docs`.

Before it reads a page, three generators write what is made of the library itself: the
API, the gallery and the tables of the benchmarks. A page of Markdown with `{code-cell}`
blocks is executed, and an error in it stops the build. Nothing here needs the network.
"""

import os
import pathlib
import subprocess
import sys
import warnings

HERE = pathlib.Path(__file__).parent
ROOT = HERE.parent
sys.path.insert(0, str(ROOT))

# Pages run on the CPU, which shows itself as eight devices to the page on meshes.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
# They compile a lot and compute little.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "true")
os.environ["PYTHONPATH"] = str(ROOT)

# Below what they read of the environment.
import optclip  # noqa: E402
from docs import api_pages  # noqa: E402

project = "optclip"
author = "the optclip authors"
copyright = author  # Sphinx's name for it
release = version = optclip.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "sphinx_design",
]
exclude_patterns = ["_build", "_generated", "**/.ipynb_checkpoints"]
source_suffix = {".md": "myst-nb", ".rst": "restructuredtext"}

# Every name in backquotes must be one that the site has a page for, or be code.
nitpicky = True
nitpick_ignore_regex = [("py:.*", api_pages.ELSEWHERE)]

myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3
nb_execution_mode = "force"
nb_execution_timeout = 240
nb_execution_raise_on_error = True
nb_merge_streams = True

napoleon_use_ivar = True  # attributes are in the docstring of their class
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_type_aliases = {name: name for name in api_pages.ALIASES}
autodoc_typehints_format = "short"
python_maximum_signature_line_length = 72
python_use_unqualified_type_names = True
add_module_names = False
templates_path = ["_templates"]

html_theme = "sphinx_book_theme"
html_title = "optclip"
html_static_path = ["_static"]
html_css_files = ["optclip.css"]
html_theme_options = {
    "show_toc_level": 2,
    "home_page_in_toc": True,
    "use_download_button": False,
    "use_fullscreen_button": False,
    "navigation_with_keys": False,
    "navbar_persistent": [],
}
html_context = {"default_mode": "auto"}
html_favicon = "_static/favicon.svg"
html_copy_source = False
html_show_sourcelink = False
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True


def setup(app):
    """Writes the generated pages, and shows docstrings as they are written here."""
    # In processes of their own: Sphinx forks its readers, which a JAX with threads may
    # not survive. Imported only, it has none.
    for made in ("api_pages", "benchmark_tables", "gallery"):
        command = [sys.executable, "-m", f"docs.{made}", str(HERE)]
        subprocess.run(command, cwd=ROOT, check=True)
    # Python warns of the fork all the same, since JAX is imported.
    warnings.filterwarnings("ignore", r"os\.fork", RuntimeWarning)
    # Before napoleon, whose handler has priority 500, reads the sections.
    app.connect("autodoc-process-docstring", api_pages.as_rst, priority=400)
    app.connect("autodoc-process-signature", api_pages.signature)
    app.connect("autodoc-skip-member", api_pages.skipped)
    app.connect("missing-reference", api_pages.resolve)
