"""Configuration of the documentation site, which ``make docs`` builds."""

import os
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE / "extensions")]

import sparse_attn  # noqa: E402 - found through the path above

project = "sparse-attn"
author = "the sparse-attn authors"
copyright = author  # Sphinx requires this name
version = release = sparse_attn.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    # in the folder extensions/
    "accessible",
    "command_line",
    "dark_pictures",
    "mathml",
    "outside_pages",
    "public_names",
]
exclude_patterns = ["_build", "extensions"]
nitpicky = True  # a reference without a target is a warning, and with a warning the build fails
# Names of other packages, whose documentation is on other sites; the build uses no network.
_OTHERS = (
    "torch|nn|F|np|numpy|hydra|lightning|L|omegaconf|transformers|collections.abc|contextlib|matplotlib|os|pathlib|rich"
)
nitpick_ignore_regex = [
    (r"py:.*", rf"({_OTHERS})\b.*"),
    (r"py:.*", r"Path|Tensor|PreTrainedModel|RemovableHandle|AlphaInit|.*\.task\.Decoded"),
]

# Text
myst_enable_extensions = ["colon_fence", "dollarmath", "fieldlist"]
myst_heading_anchors = 4
default_role = "literal"

os.environ["MATPLOTLIBRC"] = str(HERE / "tutorials" / "matplotlibrc")
os.environ["PYTHONPATH"] = str(HERE / "tutorials")  # the tutorials import notebook_setup
os.environ["OMP_WAIT_POLICY"] = "passive"  # waiting threads do not occupy cores

# A build runs the tutorials. Results are cached by their code, so that a second build is fast.
nb_execution_mode = "cache"
nb_execution_cache_path = str(HERE / "_build" / "notebooks")
nb_execution_show_tb = True  # the warning about an error in a tutorial contains the traceback
nb_execution_timeout = 300
nb_execution_in_temp = True  # a tutorial runs in a temporary folder, so its files are removed
nb_merge_streams = True
nb_ipywidgets_js: dict[str, dict[str, str]] = {}  # the default loads scripts from the network

# Reference
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 88
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False
napoleon_custom_sections = ["Shape", "Reference"]
add_module_names = False
toc_object_entries_show_parents = "hide"

# Pages
html_theme = "furo"
html_title = f"sparse-attn {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sourcelink = False
html_copy_source = False
html_math_renderer = "mathml"
pygments_style = "a11y-high-contrast-light"
pygments_dark_style = "a11y-high-contrast-dark"
