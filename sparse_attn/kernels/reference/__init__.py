"""Plain torch, any dtype and device, readable: the oracle of every faster kernel and the fall-back."""
