"""How mappings and attention are computed; their meaning is defined by ``sparse_attn.ops``.

From top to bottom, each importing only what is below it: ``choose_attention`` (what runs an attention call),
``functions`` (differentiable functions), ``dispatch`` (which backend computes), the backends ``plain``, ``cpu`` and
``triton``, ``reference`` (the oracle of all backends), ``alpha`` and ``setting`` (arguments as kernels take them).
"""
