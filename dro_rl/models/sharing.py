"""A second model over the weights of the first: what is frozen is in memory once.

Two modules, each with adapters of its own, and not one module whose adapters are switched: a layer that is recomputed
in the backward pass would meet whichever adapter was last switched on.
"""

from __future__ import annotations

import copy
import itertools
from typing import TypeVar

from torch import nn

from dro_rl.models.quantization import beside_weights

Model = TypeVar("Model", bound=nn.Module)


def twin(model: Model) -> Model:
    """A copy of a model whose frozen weights and buffers are the model's own.

    What trains is copied, and so are modules, hooks and settings: adapters put on one are not on the other. The weights
    stay common when either model moves to another device.
    """
    frozen = (parameter for parameter in model.parameters() if not parameter.requires_grad)
    common = itertools.chain(frozen, model.buffers(), beside_weights(model))
    return copy.deepcopy(model, {id(each): each for each in common})
