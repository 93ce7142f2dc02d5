"""The daemon, the network, the disk, and everything a person sees."""
