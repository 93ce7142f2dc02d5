"""Attacks on the sandbox, run as a stranger's native code would run, each beside something harmless that must work."""
