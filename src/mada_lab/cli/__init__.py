"""The command ``mada``: a file for each of its commands, whose options and run stand together.

:mod:`~mada_lab.cli.main` has the list of commands. No file here imports torch before a command runs.
"""
