"""The base class of the losses without a stock counterpart."""

from torch import nn


class Loss(nn.Module):
    """A loss that keeps its class weights in the buffer ``weight_name`` and its other arguments in attributes.

    `options` returns these attributes as keyword arguments of the functional op.
    """

    def __init__(self, weight_name, weight, **options):
        super().__init__()
        self.register_buffer(weight_name, weight)
        self._option_names = tuple(options)
        for name, value in options.items():
            setattr(self, name, value)

    def options(self):
        return {name: getattr(self, name) for name in self._option_names}

    def extra_repr(self):
        given = {name: value for name, value in self.options().items() if value is not None or name == "ignore_index"}
        return ", ".join(f"{name}={value}" for name, value in given.items())
