"""Sphinx configuration of the documentation: `make docs` builds it."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from mmman import __version__  # noqa: E402

project = 'mmman'
release = __version__
extensions = [
    'myst_parser',
    'sphinx.ext.autodoc',
    'sphinx.ext.napoleon',
    'sphinxcontrib.mermaid',
    'sphinx_copybutton',
]
exclude_patterns = ['.venv', '_build', 'requirements.txt']
highlight_language = 'none'  # indented blocks are commands and output
html_theme = 'furo'
html_title = f'mmman {release}'

myst_enable_extensions = ['dollarmath']
myst_fence_as_directive = ['mermaid']
myst_heading_anchors = 4

autodoc_member_order = 'bysource'
autodoc_typehints = 'signature'
autodoc_preserve_defaults = True
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 100
