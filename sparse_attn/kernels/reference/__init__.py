"""The mappings in readable plain torch: the oracle of all backends, the fall-back of ``plain``, the form for export."""
