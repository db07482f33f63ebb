"""Reports on a trained model's attention heads: measurements, tables, pictures, and one HTML file.

`recipes.report.write`, which draws the pictures and the page, is imported only when needed: matplotlib loads slowly.
"""

from .measure import LayerHeads, attention_density, measure_at, measure_heads, top_k_per_layer
from .tables import alpha_table, groups_table, rates_table, roles_table

__all__ = [
    "LayerHeads",
    "alpha_table",
    "attention_density",
    "groups_table",
    "measure_at",
    "measure_heads",
    "rates_table",
    "roles_table",
    "top_k_per_layer",
]
