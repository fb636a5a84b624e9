"""Deprecated: the functions of theory are in ``mada_lab.theory`` now. This name stands for that package."""

import sys
from importlib import import_module

from mada_optim.warn import warn

warn("mada_optim.theory is deprecated; use mada_lab.theory", DeprecationWarning)
# By its name: the library does not depend on the laboratory.
sys.modules[__name__] = import_module("mada_lab.theory")
