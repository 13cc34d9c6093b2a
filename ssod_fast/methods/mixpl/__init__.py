"""MixPL."""

from .cache import RingCache as RingCache
from .config import MixPLConfig as MixPLConfig
from .method import MixPL as MixPL
