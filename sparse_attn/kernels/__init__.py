"""Computation of the mappings and of attention, which ``sparse_attn.ops`` defines.

The modules from top to bottom; each imports only modules below it: ``choose_attention`` (which implementation runs an
attention call) and ``direct`` (the short way to the C kernel), ``functions`` (differentiable functions), ``dispatch``
(which backend computes), the backends ``plain``, ``cpu`` and ``triton``, ``reference`` (the oracle of all backends),
``alpha``, ``setting`` and ``sinks`` (arguments in the form that kernels take), and ``dropout``.
"""
