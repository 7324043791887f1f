"""The site's settings: build it by ``make docs``, or ``make docs SMOKE=1`` for short tutorials."""

import hashlib
import importlib.util
import os
import pathlib
import sys

HERE = pathlib.Path(__file__).parent
ROOT = HERE.parent
sys.path[:0] = [str(HERE), str(ROOT)]

import inventories  # noqa: E402
import measured  # noqa: E402
from docutils import nodes  # noqa: E402

import pyro_iaf  # noqa: E402


def package_hash():
    """A hash of all code of the package."""
    code = b"".join(path.read_bytes() for path in sorted((ROOT / "pyro_iaf").rglob("*.py")))
    return hashlib.sha256(code).hexdigest()[:16]


project = "pyro_iaf"
version = release = pyro_iaf.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.intersphinx",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
]
exclude_patterns = ["_build", "*.py"]
nitpicky = True  # warns of references that are not found, except for these
nitpick_ignore_regex = [("py:class", r"collections\.abc\..*|pathlib\..*|pyro_iaf\.flows\.base\..*")]

html_theme = "furo"
html_title = f"pyro_iaf {release}"
html_static_path = ["site.css"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_copyright = False

# Formulas without network access: a single file draws them as SVG, without fonts.
(mathjax,) = importlib.util.find_spec("sphinx-mathjax-offline").submodule_search_locations
html_static_path += [f"{mathjax}/static/mathjax/tex-svg.js"]
mathjax_path = "tex-svg.js"

# Pages in Markdown, with numbers from the benchmarks.
myst_enable_extensions = ["attrs_block", "attrs_inline", "dollarmath", "substitution"]
myst_substitutions = measured.substitutions()
myst_heading_anchors = 3

# Docstrings. Types are in the descriptions of the arguments, so signatures are short.
autodoc_member_order = "bysource"
autodoc_inherit_docstrings = False
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented_params"
autodoc_typehints_format = "short"
napoleon_numpy_docstring = False
napoleon_use_ivar = True

# References to Pyro and PyTorch.
intersphinx_mapping = inventories.mapping(HERE / "_build" / "inventories")

# Tutorials and code on pages run if they or the package have changed; an error fails the build.
nb_execution_mode = "cache"
nb_execution_cache_path = str(HERE / "_build" / "cache" / package_hash())
nb_execution_in_temp = True
nb_execution_raise_on_error = True
nb_execution_show_tb = True
nb_execution_timeout = -1
nb_output_stderr = "remove"
nb_merge_streams = True
nb_custom_formats = {".py": ["jupytext.reads", {"fmt": "py:percent"}]}
os.environ["TQDM_DISABLE"] = "1"

FIRST_CELL = """# %% tags=["remove-cell"]
import sys

sys.argv = {}

"""


def copy_tutorials(app):
    """Copies the tutorials to the pages, each with a hidden first cell."""
    copies = HERE / "tutorials"
    copies.mkdir(exist_ok=True)
    pictures = (HERE / "first_cell.py").read_text()
    wanted = {copies / path.name: path for path in (ROOT / "tutorials").glob("*.py")}
    for copy in copies.iterdir():
        if copy not in wanted:
            copy.unlink()
    for copy, path in wanted.items():
        arguments = [path.name, *(["--smoke"] if os.environ.get("SMOKE") else [])]
        text = FIRST_CELL.format(arguments) + pictures + "\n" + path.read_text()
        if not copy.exists() or copy.read_text() != text:  # unchanged pages are not rebuilt
            copy.write_text(text)


def name_pictures(app, doctree):
    """Gives pictures without an alternative text the titles of their page and section."""
    for picture in doctree.findall(nodes.image):
        place, titles = picture.parent, []
        while place is not None:
            if isinstance(place, nodes.section):
                titles.insert(0, place.next_node(nodes.title).astext())
            place = place.parent
        picture.setdefault("alt", ": ".join(titles))


def setup(app):
    """Connects the functions above to Sphinx, which calls this."""
    app.connect("doctree-read", name_pictures)
    app.connect("builder-inited", copy_tutorials)
    app.connect("missing-reference", inventories.describe, priority=400)  # before intersphinx
