"""Our ops in the detectors of transformers 5.17 and later: attention, matchers and losses.

There is no registration with the package `kernels`, which `use_kernels=True` takes layers from: that very call enters the layer of the hub
over any other of its name. :func:`patch` serves such models, too, before and after the call.
"""

from .loss_setter import set_loss, unset_loss
from .matchers import patch_matchers, unpatch_matchers
from .models import patch, register, unpatch, unregister

__all__ = ["patch", "patch_matchers", "register", "set_loss", "unpatch", "unpatch_matchers", "unregister", "unset_loss"]
