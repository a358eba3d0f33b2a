"""The engine: everything that needs torch.

A thread that waits at the end of a parallel product spins for a moment before it sleeps. libgomp's moment (300,000
turns) is made for machines with nothing else to do: with other work on two cores a decode step took 1.2 s where it
took 0.11 s with 1,000 turns. It is read when torch is loaded, so it is set before any module here imports torch.
"""

import os

if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
