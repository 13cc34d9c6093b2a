"""Supervised training, the baseline."""

from .config import SupervisedConfig as SupervisedConfig
from .method import SupervisedMethod as SupervisedMethod
