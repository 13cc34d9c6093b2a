"""Our ops in the detectors of transformers 5.17 and later: attention, matchers and losses."""

from .loss_setter import set_loss, unset_loss
from .matchers import patch_matchers, unpatch_matchers
from .models import patch, register, unpatch, unregister

__all__ = ["patch", "patch_matchers", "register", "set_loss", "unpatch", "unpatch_matchers", "unregister", "unset_loss"]
