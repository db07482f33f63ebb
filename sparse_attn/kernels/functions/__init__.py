"""Mappings, losses and attention as differentiable functions, for autograd, vmap and torch.compile."""
