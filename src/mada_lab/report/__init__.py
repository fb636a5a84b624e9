"""What is said of stored runs: results, tables, figures, pages.

It reads what ``mada_lab.sweep`` stores and writes beside it; a stage's folder and its names belong to that package.
"""
