"""Statistics of attention: what each head looks at, how much of it, and how widely."""

from sparse_attn.analysis.density import density, support_counts
from sparse_attn.analysis.pieces import merge_pieces, word_groups
from sparse_attn.analysis.record import record_attention
from sparse_attn.analysis.roles import (
    ROLE_THRESHOLDS,
    entropy,
    mean_per_head,
    monotonicity,
    name_roles,
    offset_weight,
    strongest_at_offset,
)
from sparse_attn.analysis.statistics import AttentionRecord, HeadStatistics

__all__ = [
    "ROLE_THRESHOLDS",
    "AttentionRecord",
    "HeadStatistics",
    "density",
    "entropy",
    "mean_per_head",
    "merge_pieces",
    "monotonicity",
    "name_roles",
    "offset_weight",
    "record_attention",
    "strongest_at_offset",
    "support_counts",
    "word_groups",
]
