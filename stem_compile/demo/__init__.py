"""The demo behind ``stem-compile demo``: ``race`` runs the contenders against each other, ``comparison`` and ``chart``
show the result."""
