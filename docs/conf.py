"""How the site is built: ``make docs``, or ``make docs SMOKE=1`` with the tutorials cut short."""

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
    """Of all code of the package."""
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
nitpicky = True  # a name that leads nowhere is a mistake, but for these
nitpick_ignore_regex = [("py:class", r"collections\.abc\..*|pathlib\..*|pyro_iaf\.flows\.base\..*")]

html_theme = "furo"
html_title = f"pyro_iaf {release}"
html_static_path = ["site.css"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_copyright = False

# Formulas without a network: one file that draws them as pictures, and needs no fonts.
(mathjax,) = importlib.util.find_spec("sphinx-mathjax-offline").submodule_search_locations
html_static_path += [f"{mathjax}/static/mathjax/tex-svg.js"]
mathjax_path = "tex-svg.js"

# Pages in Markdown, with numbers as they were measured.
myst_enable_extensions = ["attrs_block", "attrs_inline", "dollarmath", "substitution"]
myst_substitutions = measured.substitutions()
myst_heading_anchors = 3

# Docstrings. Types stand beside what they are types of, and signatures stay short.
autodoc_member_order = "bysource"
autodoc_inherit_docstrings = False
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented_params"
autodoc_typehints_format = "short"
napoleon_numpy_docstring = False
napoleon_use_ivar = True

# What Pyro and PyTorch describe.
intersphinx_mapping = inventories.mapping(HERE / "_build" / "inventories")

# Tutorials and the code on pages run when they or the package have changed; what fails, fails the
# build.
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
    """Puts the tutorials among the pages, each with a first cell that is not shown."""
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
        if not copy.exists() or copy.read_text() != text:  # else its page is as it was
            copy.write_text(text)


def name_pictures(app, doctree):
    """Gives pictures that say nothing of themselves the names of their page and section."""
    for picture in doctree.findall(nodes.image):
        place, titles = picture.parent, []
        while place is not None:
            if isinstance(place, nodes.section):
                titles.insert(0, place.next_node(nodes.title).astext())
            place = place.parent
        picture.setdefault("alt", ": ".join(titles))


def setup(app):
    """Called by Sphinx."""
    app.connect("doctree-read", name_pictures)
    app.connect("builder-inited", copy_tutorials)
    app.connect("missing-reference", inventories.describe, priority=400)  # before intersphinx
