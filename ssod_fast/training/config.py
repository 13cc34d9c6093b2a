"""Everything a run depends on, as frozen dataclasses. The comments on the fields are the help texts of the command line."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Generic, Literal, TypeVar

import yaml
from tyro.conf import Positional, arg

from ssod_fast.data.views import ViewConfig
from ssod_fast.methods import METHODS

from .files import write_text
from .optim import OptimizerConfig, ScheduleConfig
from .presets import merged, method_defaults, run_defaults
from .tree import ConfigError, from_tree, to_tree

M = TypeVar("M")

# Keys that say where and how long a run goes on, not what it computes: they may change on resume.
FREE_KEYS = ("out", "name", "resume", "overwrite", "dry_run", "workers", "cache_mb", "threads", "report", "log_every", "preview_images")


@dataclass(frozen=True)
class TrainConfig(Generic[M]):
    """Trains a detector on labelled images, and with a semi-supervised method on unlabelled ones too."""

    # Labelled set: a COCO json, a YOLO data.yaml, or a COCO, YOLO or VOC folder (its train split where it has several).
    labeled: Annotated[Positional[Path], arg(metavar="LABELED")]
    # Options of the method; --method NAME chooses which.
    method: M
    # Unlabelled images: a folder (searched recursively), a txt list, a glob, or a COCO json whose annotations are not read.
    unlabeled: Annotated[Positional[str | None], arg(metavar="[UNLABELED]")] = None
    # Set for evaluation; by default the val split of the labelled folder, if it has one.
    val: Path | None = None

    # torchvision:NAME, for example torchvision:fcos_mobilenet_v2_fpn; own:NAME, for example own:dino_resnet50; hf:PATH, a detection
    # transformer of transformers; or package.module:callable.
    model: str = "torchvision:fcos_resnet50_fpn"
    # Arguments of the model as name=value, for example fpn_channels=128.
    model_options: tuple[str, ...] = ()
    # File with weights of the whole detector (safetensors or pt); nothing is ever downloaded.
    weights: Path | None = None
    # File with weights of the backbone.
    backbone_weights: Path | None = None
    # Detector file or run folder to start from; tensors that do not fit are listed.
    init_from: Path | None = None

    # Optimizer steps.
    iters: int = 10_000
    # Labelled:unlabelled images per step and process.
    batch: str = "1:4"
    # fixed: that many of each in every step. bernoulli: each image of a step is labelled with that probability, and at least one of each is
    # there (SoftTeacher, Semi-DETR: 1.33 + 3.67 on average for 1:4).
    batch_draw: Literal["fixed", "bernoulli"] = "fixed"
    # Steps of the method whose gradients are added up before an optimizer step.
    accumulate: int = 1
    # Learning rate, used as it is; without it the recipe's, see scale_lr.
    lr: float | None = None
    # Scale the recipe's learning rate with the batch; optimizer.lr_scaling says how.
    scale_lr: bool = True
    # auto: bf16 on a GPU that has it, fp32 on the CPU.
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    # Where to train; auto: a GPU if there is one.
    device: Literal["auto", "cpu", "cuda"] = "auto"
    # Seed of everything that is drawn.
    seed: int = 0
    # Loader processes; 0 reads images in the training process.
    workers: int = 2
    # Decoded images kept in memory, in MiB; worth it for sets of a few hundred images.
    cache_mb: int = 512
    # Threads of torch; none: torch decides.
    threads: int | None = None

    # Draw this share (per cent) of LABELED as labelled; the others become unlabelled and lose their annotations.
    percent: float | None = None
    # Which of the repeatable draws.
    fold: int = 1
    # How the share is drawn, see `ssod-fast split`.
    protocol: str = "softteacher"
    # Added to the seed of the draw.
    seed_offset: int = 0
    # Draw again until every class has a labelled box; off for the published draws as they are.
    cover_classes: bool = True
    # COCO json with the truth of the unlabelled images, to measure pseudo labels with; no loss can read it.
    hidden_gt: Path | None = None
    # Damaged annotations are an error instead of a counted warning.
    strict_data: bool = False
    # Repeat labelled images with rare classes by the LVIS rule with this threshold.
    resample: float | None = None
    # Put images of one orientation into a batch (less padding).
    aspect_groups: bool = False

    # Iterations between evaluations; default max(500, iters / 20), for short runs a fifth of them.
    eval_every: int | None = None
    # Iterations between checkpoints; default as eval_every.
    save_every: int | None = None
    # Iterations between lines of the log.
    log_every: int = 50
    # Detections below this score are not evaluated.
    score_thr: float = 1e-3
    # Unlabelled images whose boxes are shown at every evaluation.
    preview_images: int = 16

    # Parent of the run folder.
    out: Path = Path("runs")
    # Name of the run folder; default METHOD-DATA.
    name: str | None = None
    # auto continues a run of the same settings; yes also one whose settings differ; no never.
    resume: Literal["auto", "yes", "no"] = "auto"
    # Delete the run folder's earlier run.
    overwrite: bool = False
    # Build everything, run two steps, print estimated time and, on a GPU, memory; write nothing.
    dry_run: bool = False
    # Write report.html at the end.
    report: bool = True

    # Sizes and augmentations of the views.
    views: ViewConfig = field(default_factory=ViewConfig)
    # Optimizer.
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    # Learning-rate schedule.
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)

    def __post_init__(self) -> None:
        _check(self)

    @property
    def method_name(self) -> str:
        """Name of the method on the command line."""
        return next(name for name, (config, _) in METHODS.items() if type(self.method) is config)

    @property
    def per_batch(self) -> tuple[int, int]:
        """Labelled and unlabelled images per step and process."""
        return parse_batch(self.batch)

    @property
    def run_name(self) -> str:
        """Name of the run folder."""
        return self.name or f"{self.method_name}-{self.labeled.stem if self.labeled.suffix else self.labeled.name}"

    @property
    def folder(self) -> Path:
        """The run folder."""
        return self.out / self.run_name

    @property
    def model_kwargs(self) -> dict[str, Any]:
        """`model_options` as keyword arguments; values are read as YAML, so 64, 0.1, true and [1, 2] mean what they look like."""
        return {name: yaml.safe_load(value) for name, _, value in (option.partition("=") for option in self.model_options)}

    def total_batch(self, processes: int = 1) -> int:
        """Images per optimizer step."""
        labeled, unlabeled = self.per_batch
        used = labeled + unlabeled if hasattr(self.method, "unlabeled_batch") else labeled
        return used * self.accumulate * processes


def parse_batch(text: str) -> tuple[int, int]:
    """`"1:4"` -> (1, 4); `"4"` -> (4, 0).

    Raises:
        ConfigError: neither form, or no labelled image.
    """
    parts = text.split(":")
    if len(parts) not in (1, 2) or not all(p.strip().isdigit() for p in parts) or int(parts[0]) < 1:
        raise ConfigError(f"batch must be LABELED or LABELED:UNLABELED with at least one labelled image, such as 1:4, got {text!r}")
    return int(parts[0]), int(parts[1]) if len(parts) == 2 else 0


def _check(config: TrainConfig[Any]) -> None:
    if type(config.method) not in {kind for kind, _ in METHODS.values()}:
        raise ConfigError(f"method must be the options of one of {', '.join(METHODS)}, got {type(config.method).__name__}")
    parse_batch(config.batch)
    for name in ("iters", "accumulate", "log_every"):
        if getattr(config, name) < 1:
            raise ConfigError(f"{name} must be at least 1, got {getattr(config, name)}")
    for name in ("eval_every", "save_every", "threads"):
        value = getattr(config, name)
        if value is not None and value < 1:
            raise ConfigError(f"{name} must be at least 1, got {value}")
    for name in ("seed", "workers", "cache_mb", "preview_images"):
        if getattr(config, name) < 0:
            raise ConfigError(f"{name} must not be negative, got {getattr(config, name)}")
    if config.percent is not None and not 0 < config.percent <= 100:
        raise ConfigError(f"percent must lie in (0, 100], got {config.percent}")
    if config.lr is not None and not config.lr > 0:
        raise ConfigError(f"lr must be positive, got {config.lr}")
    for option in config.model_options:
        if not option.partition("=")[0].isidentifier() or "=" not in option:
            raise ConfigError(f"model_options must be name=value, got {option!r}")


def resolve(config: TrainConfig[M]) -> TrainConfig[M]:
    """Fills in what depends on other settings, so that the config written to the run folder says everything; idempotent."""
    every = config.eval_every or min(max(500, config.iters // 20), max(1, config.iters // 5))
    labeled, unlabeled = config.per_batch
    changes: dict[str, Any] = {"eval_every": every, "save_every": config.save_every or every, "name": config.run_name}
    if hasattr(config.method, "unlabeled_batch"):
        if unlabeled < 1:
            raise ConfigError(
                f"batch must name unlabelled images for --method {config.method_name}, such as {labeled}:4, got {config.batch!r}"
            )
        changes["method"] = _fit_method(config.method, unlabeled, config)
    else:
        changes["batch"] = str(labeled)
        method: Any = config.method
        if hasattr(method, "seed"):
            changes["method"] = dataclasses.replace(method, seed=config.seed)
    if config.batch_draw == "bernoulli" and config.method_name != "semi_detr":
        raise ConfigError(f"batch_draw must be fixed for --method {config.method_name}, whose batches are all alike, got 'bernoulli'")
    return dataclasses.replace(config, **changes)


def _fit_method(method: Any, unlabeled: int, config: TrainConfig[Any]) -> Any:
    """Options of the method that follow from the batch, the seed and the view sizes."""
    changes: dict[str, Any] = {"unlabeled_batch": unlabeled, "seed": config.seed}
    if getattr(method, "switch_at", 0) is None:
        changes["switch_at"] = config.iters // 2  # the first half of all published schedules
    default = type(method)()
    untouched = hasattr(method, "mosaic_shape") and method.mosaic_shape == default.mosaic_shape
    if untouched and config.views != ViewConfig():
        # Official tiles run from the smallest short side of a view to the test size.
        low, high = config.views.short_side[0], max(config.views.test_short_side, config.views.short_side[0] + 1)
        changes["mosaic_shape"] = ((low, low), (high, high))
    return dataclasses.replace(method, **changes)


def refuse_overridden(config: TrainConfig[Any], before: Any) -> None:
    """Settings of the method that :func:`resolve` takes from the run cannot be given another value.

    Args:
        config: as given.
        before: options of the method as they were before the user's own.

    Raises:
        ConfigError: one was changed to a value that the run would override.
    """
    resolved = {"unlabeled_batch": ("batch", config.per_batch[1]), "seed": ("seed", config.seed)}
    for name, (source, value) in resolved.items():
        given = getattr(config.method, name, value)
        if given not in (value, getattr(before, name, given)):
            raise ConfigError(f"method.{name} follows from {source} ({value} here) and cannot be {given}: leave it out and set --{source}")


def to_yaml(config: TrainConfig[Any]) -> str:
    """The config as YAML, the method's name included."""
    tree = to_tree(config)
    tree["method"] = {"name": config.method_name, **tree["method"]}
    return str(yaml.safe_dump(tree, sort_keys=False, allow_unicode=True))


def tree_of(config: TrainConfig[Any]) -> dict[str, Any]:
    """The config as the plain tree that YAML and JSON hold."""
    return dict(yaml.safe_load(to_yaml(config)))


def write_config(config: TrainConfig[Any], path: Path) -> None:
    """Writes the config atomically."""
    write_text(path, to_yaml(config))


def read_tree(path: Path) -> dict[str, Any]:
    """A YAML file as a tree.

    Raises:
        ConfigError: no such file, no YAML, or no mapping.
    """
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read the config {path}: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not YAML: {error}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} must hold a mapping of settings, got {type(tree).__name__}")
    return tree


def config_from_tree(tree: Mapping[str, Any]) -> TrainConfig[Any]:
    """A config from a tree; `method` is a name or a mapping with `name` and options.

    What the tree leaves out comes from the presets of the method and of the detector family, then from the defaults of the fields.

    Raises:
        ConfigError: see :func:`ssod_fast.training.tree.from_tree`.
    """
    tree = dict(tree)
    name, options = split_method(tree.get("method", "mixpl"))
    tree = merged(run_defaults(name, tree.get("model")), tree)
    default = method_defaults(name, str(tree.get("model", TrainConfig.model)))
    tree["method"] = from_tree(type(default), {**to_tree(default), **options}, "method")
    config = from_tree(TrainConfig, tree, types_of={"method": type(default)})
    refuse_overridden(config, default)
    return config


def split_method(value: Any) -> tuple[str, dict[str, Any]]:
    """Name and options of a `method` entry."""
    if isinstance(value, str):
        return value, {}
    if isinstance(value, Mapping) and isinstance(value.get("name"), str):
        return value["name"], {key: v for key, v in value.items() if key != "name"}
    raise ConfigError(f"method must be a name or a mapping with the key name, got {value!r}")
