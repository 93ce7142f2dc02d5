"""Arithmetic that gives the same bits on every machine: exact integer sums, fixed elementary functions. DESIGN §6."""

from worker.exact.kernels import Kernel, kernels
from worker.exact.products import int8_is_exact, int8_is_faster
from worker.exact.random import normal, uniform

__all__ = ["Kernel", "int8_is_exact", "int8_is_faster", "kernels", "normal", "uniform"]
