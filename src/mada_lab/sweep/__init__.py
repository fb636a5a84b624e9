"""Many runs on equal terms: an experiment, the plan of its runs, the pool in which they are trained.

The folder of a stage is this package's: what is written into it and what is read from it. What is said of it is made in
``mada_lab.report``, which reads it through ``stage_folder.py``; nothing here imports that package.
"""
