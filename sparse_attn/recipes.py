"""The package ``sparse_attn.recipes`` in a checkout, where the folder ``recipes/`` is at the top level.

A wheel contains the folder ``recipes/`` here instead of this file. So the command ``sparse-attn`` finds its code under
the same name in every kind of installation, and a package ``recipes`` of another project cannot conflict with it.
"""

from pathlib import Path

# A module with a search path is a package: `import sparse_attn.recipes.train` reads recipes/train.py.
__path__ = [str(Path(__file__).resolve().parent.parent / "recipes")]
