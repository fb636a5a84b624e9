"""The learned scale: a learning rate that is found in the first steps and then held, for any torch optimizer.

``rule`` says how one number moves, ``way`` what is measured of the parameters, ``rate`` how a learning rate shows both
what was given and what is used; ``learned`` puts them together in :class:`LearnedScale`.
"""

from mada_optim.scale.learned import LearnedScale
from mada_optim.scale.rule import ADAPTIVE, SearchSettings

__all__ = ["ADAPTIVE", "LearnedScale", "SearchSettings"]
