"""Stands for the package ``sparse_attn.recipes`` in a checkout, where the recipes lie at the top.

A wheel carries ``recipes/`` at this place, and not this file: the command ``sparse-attn`` finds its code under one name
however it was installed, and a package ``recipes`` of another project neither hides it nor is hidden by it.
"""

from pathlib import Path

# A module with a search path is a package: `import sparse_attn.recipes.train` reads recipes/train.py.
__path__ = [str(Path(__file__).resolve().parent.parent / "recipes")]
