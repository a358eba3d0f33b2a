"""The engine: everything that needs torch.

A thread that waits at the end of a parallel product spins for a while before it sleeps. libgomp's 300,000 turns are
made for machines with nothing else to do: with other work on two cores a decode step took 1.2 s, with 20,000 turns
0.23 s. On an idle machine 30,000 train as fast as 300,000; 10,000 lose 4 %, 1,000 lose 28 %. It is read when torch is
loaded, so it is set before any module here imports torch.
"""

import os

if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")
