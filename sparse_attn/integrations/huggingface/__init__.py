"""Sparse attention in Hugging Face transformers.

Example:
    >>> from transformers import AutoModel, BertConfig
    >>> from sparse_attn.integrations.huggingface import add_alpha, register
    >>> register()
    >>> config = BertConfig(vocab_size=31, hidden_size=16, num_hidden_layers=2, num_attention_heads=2)
    >>> model = AutoModel.from_config(config, attn_implementation="entmax")
    >>> list(add_alpha(model))
    ['encoder.layer.0.attention.self', 'encoder.layer.1.attention.self']
"""

from sparse_attn.integrations.huggingface.alpha import add_alpha, remove_alpha
from sparse_attn.integrations.huggingface.attention import register
from sparse_attn.integrations.huggingface.checkpoint import load_alpha

__all__ = ["add_alpha", "load_alpha", "register", "remove_alpha"]
