"""The command ``mada``: a file for each of its commands, whose options and run stand together.

main.py has the list of the commands. Several commands share what is in option_groups.py, stages.py and theory.py. How
options are read, and how their help is printed, is in options.py and defaults.py. No file here imports torch before a
command runs.
"""
