"""Readers, splits, views and loaders of detection data. Needs torchvision and Pillow where images are touched."""

from .batches import EvalBatch, LabeledBatch, UnlabeledBatch
from .box_accuracy import BoxAccuracy, box_accuracy
from .coco import read_coco
from .detect import has_split, load_detection_data
from .image_io import UnreadableImageError, read_image
from .loader import EvalLoader, LoaderConfig, TrainLoader
from .noise import NoiseConfig, NoiseFiles, add_noise, write_noise
from .records import DataReport, DetectionData, ImageRecord, check_same_classes
from .resample import LabeledResampler, repeat_factors
from .split import Split, SplitData, apply_split, draw_split
from .split_files import SplitFiles, split_main, write_split
from .synthetic import SceneConfig, ScenePaths, write_scenes
from .unlabeled import list_images
from .views import View, ViewConfig, labeled_view, test_view, weak_strong_views

__all__ = [
    "BoxAccuracy",
    "DataReport",
    "DetectionData",
    "EvalBatch",
    "EvalLoader",
    "ImageRecord",
    "LabeledBatch",
    "LabeledResampler",
    "LoaderConfig",
    "NoiseConfig",
    "NoiseFiles",
    "SceneConfig",
    "ScenePaths",
    "Split",
    "SplitData",
    "SplitFiles",
    "TrainLoader",
    "UnlabeledBatch",
    "UnreadableImageError",
    "View",
    "ViewConfig",
    "add_noise",
    "apply_split",
    "box_accuracy",
    "check_same_classes",
    "draw_split",
    "has_split",
    "labeled_view",
    "list_images",
    "load_detection_data",
    "read_coco",
    "read_image",
    "repeat_factors",
    "split_main",
    "test_view",
    "weak_strong_views",
    "write_noise",
    "write_scenes",
    "write_split",
]
