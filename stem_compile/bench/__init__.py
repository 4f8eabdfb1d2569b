"""Measuring a user's model: what a target names, speed, quality, tuning, the machine, and how results are shown.

``target`` and ``factory`` load models and make inputs; ``measure`` and ``prefill`` observe one call; ``speed``,
``quality`` and ``tune`` are the commands' work; ``terminal``, ``units``, ``chart`` and ``page`` show what came out.
"""
