"""Records, arithmetic of roots, programs and rules that must be the same for every peer. Pure: no IO."""
