"""A page, pictures and exports of recorded attention, for every model that `record_attention` can record."""

from sparse_attn.viewer.handover import bertviz_arguments, circuitsvis_arguments
from sparse_attn.viewer.view import AttentionView, attention_view

__all__ = ["AttentionView", "attention_view", "bertviz_arguments", "circuitsvis_arguments"]
