"""The backend "torch": plain operations of PyTorch, for any dtype and device."""
