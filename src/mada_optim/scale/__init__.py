"""The learned scale: a learning rate that is found in the first steps and then held, for any torch optimizer.

``rule`` says how one number moves, ``way`` what is measured of the parameters; ``search`` makes steps of them. ``rate``
says how a learning rate shows both what was given and what is used, ``schedule`` what a rate is a share of. ``learned``
puts them together in :class:`LearnedScale`, by the hooks of optimizers.
"""

from mada_optim.scale.learned import LearnedScale
from mada_optim.scale.rule import ADAPTIVE, SearchSettings

__all__ = ["ADAPTIVE", "LearnedScale", "SearchSettings"]
