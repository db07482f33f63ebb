"""Statistics of attention heads: density, entropy, roles, diversity, alignments, subword pieces, rollout and worth."""

from sparse_attn.analysis.alignment import AlignmentRule, align
from sparse_attn.analysis.density import density, support_counts
from sparse_attn.analysis.diversity import head_diversity
from sparse_attn.analysis.pieces import merge_pieces, own_word_weight, word_groups
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
from sparse_attn.analysis.rollout import attention_rollout
from sparse_attn.analysis.statistics import AttentionRecord, HeadStatistics
from sparse_attn.analysis.worth import HeadChange, count_head_changes, head_worth

__all__ = [
    "ROLE_THRESHOLDS",
    "AlignmentRule",
    "AttentionRecord",
    "HeadChange",
    "HeadStatistics",
    "align",
    "attention_rollout",
    "count_head_changes",
    "density",
    "entropy",
    "head_diversity",
    "head_worth",
    "mean_per_head",
    "merge_pieces",
    "monotonicity",
    "name_roles",
    "offset_weight",
    "own_word_weight",
    "record_attention",
    "strongest_at_offset",
    "support_counts",
    "word_groups",
]
