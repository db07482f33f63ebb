"""Mappings, losses and attention as differentiable functions: what autograd, vmap and torch.compile see."""
