"""placeholder"""

from mada_optim.kernels.plain import PlainKernels


class CompiledKernels(PlainKernels):
    pass
