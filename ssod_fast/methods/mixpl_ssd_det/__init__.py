"""MixPL whose labelled boxes are noisy, refined by SSD-Det while training."""

from .config import MixPLSSDDetConfig as MixPLSSDDetConfig
from .method import MixPLSSDDet as MixPLSSDDet
