"""The demo and the speed comparisons behind ``stem-compile demo`` and ``stem-compile bench``.

``text`` writes the prompt, ``target`` loads models, ``measure`` observes one prefill, ``race`` runs the contenders
against each other,
``report`` and ``chart`` show what came out.
"""
