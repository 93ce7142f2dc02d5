"""Captures models, executes Programs (exact or native), and confines the process that does. The only torch.

Importing this package does not import torch: the daemon uses its sandbox parts and must stay small.
"""
