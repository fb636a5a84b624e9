"""The laboratory beside mada-optim: tasks, runs, sweeps, reports, timings, theory, and the command ``mada``.

Needs ``pip install 'mada-optim[lab]'``. It uses the library, which knows nothing of it. Each package imports only those
before it: tasks, optimizers; run; sweep; report; display, bench, theory; demo; cli.
"""
