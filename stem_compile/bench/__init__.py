"""Measuring a model: targets, timing, the machine, and what optional packages are missing."""
