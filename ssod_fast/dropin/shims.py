"""Stands in for compiled extensions of deformable attention: no compiler, no matching CUDA toolkit, and a CPU works too."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from torch import Tensor

from ..ops import ms_deform_attn
from ..ops.ms_deform_attn import ms_deform_attn_gradients
from ._patch import Patched, Plan, UnknownSurface, check_switch, is_replaced, restore

_NAMES = ("ms_deform_attn_forward", "ms_deform_attn_backward")
Functions = tuple[Callable[..., Any], Callable[..., Any]]


def install_as(name: str, *, deterministic: bool | None = None) -> Patched:
    """Makes an extension module importable that was never built, or puts our ops into one that was.

    Call it before the model code is imported for the first time: `import MultiScaleDeformableAttention as MSDA`,
    `from detrex import _C`, `from groundingdino import _C` and `import mmcv.ops` then succeed. Where the extension is loaded already, its
    two functions are replaced, which covers all code that holds it. GroundingDINO, which survives a failed import, gets it afterwards
    too; detrex, whose attention module does not, wants :func:`ssod_fast.dropin.detrex.patch` then.

    All calls take any batch (`im2col_step` is ignored), any mix of dtypes, and tensors of any device. As "mmcv._ext" the other functions
    of that extension exist as well, and raise NotImplementedError when called: mmcv.ops asserts their names when it is imported.

    Args:
        name: "MultiScaleDeformableAttention" (Deformable DETR, DINO, H-Deformable-DETR, Mask2Former, Semi-DETR), "detrex._C",
            "groundingdino._C" or "mmcv._ext".
        deterministic: whether backwards sum in a fixed order; by default as `torch.use_deterministic_algorithms` says then.

    Returns:
        What is replaced; a context manager that puts it back. Code imported in between keeps the shim.

    Raises:
        ValueError: for another name, and where the shim or the replacement is there with another `deterministic`.
        TypeError: if `deterministic` is neither a bool nor None.
        UnknownSurface: if a module of that name is loaded and has no such functions.
    """
    if not isinstance(name, str) or name not in _EXTENSIONS:
        raise ValueError(f"name must be one of {', '.join(map(repr, _EXTENSIONS))}, got {name!r}")
    check_switch("deterministic", deterministic, optional=True)
    plan = Plan(".undo() of what the first has returned", deterministic=deterministic)
    plan_extension(plan, name, deterministic)
    return plan.apply(f"{name} needs no shim")


def plan_extension(plan: Plan, name: str, deterministic: bool | None) -> None:
    """Plans what :func:`install_as` does.

    Args:
        plan: gets the replacements.
        name: of the extension.
        deterministic: see :func:`install_as`.

    Raises:
        UnknownSurface: if a module of that name is loaded and has no such functions.
    """
    extension = _EXTENSIONS[name]
    functions = extension.functions(deterministic)
    if name not in sys.modules:
        restore(_MODULES, name)  # where somebody has removed a shim from sys.modules
        _plan_shim(plan, name, _module(name, functions, stubs=extension.has_others))
    elif is_replaced(_MODULES, name):
        _plan_shim(plan, name, sys.modules[name])
    else:
        _plan_functions(plan, sys.modules[name], functions)


def _plan_shim(plan: Plan, name: str, shim: ModuleType) -> None:
    plan.add(_MODULES, name, shim, f"sys.modules[{name!r}]")
    package, _, attribute = name.rpartition(".")
    for owner in (package, *_EXTENSIONS[name].users):
        # A failed import has left the attribute out, in the package and where it is a global.
        if owner in sys.modules and (vars(sys.modules[owner]).get(attribute) is None or is_replaced(sys.modules[owner], attribute)):
            plan.add(sys.modules[owner], attribute, shim)


def _plan_functions(plan: Plan, extension: ModuleType, functions: Functions) -> None:
    missing = [name for name in _NAMES if not callable(getattr(extension, name, None))]
    if missing:
        where = getattr(extension, "__file__", None) or "no file"
        raise UnknownSurface(f"{extension.__name__} is loaded ({where}) and has no {' and no '.join(missing)}: nothing was patched")
    for name, function in zip(_NAMES, functions, strict=True):
        plan.add(extension, name, function)


class _Modules:
    """Entries of sys.modules as attributes, so that they are replaced and put back as everything else is."""

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if isinstance(value, ModuleType):
            sys.modules[name] = value

    def __delattr__(self, name: str) -> None:
        if sys.modules.get(name) is vars(self).get(name):
            sys.modules.pop(name, None)
        super().__delattr__(name)


_MODULES = _Modules()


def _module(name: str, functions: Functions, stubs: bool) -> ModuleType:
    module = ModuleType(name, f"Deformable attention of ssod_fast under the name of {name}.")
    module.__spec__ = ModuleSpec(name, None, origin="ssod_fast.dropin")
    for attribute, function in zip(_NAMES, functions, strict=True):
        setattr(module, attribute, function)
    if stubs:
        vars(module)["__getattr__"] = lambda attribute: _stub(name, attribute)
    return module


def _stub(module: str, name: str) -> Callable[..., Any]:
    if name.startswith("_"):  # asked for by the import system and by inspect
        raise AttributeError(f"module {module!r} has no attribute {name!r}")

    def missing(*args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(f"{module}.{name} is not there: ssod_fast stands in for {module} and has {' and '.join(_NAMES)} only")

    return missing


def returning_functions(deterministic: bool | None) -> Functions:
    """The two functions of the 2020 extension, which return their results.

    Args:
        deterministic: see :func:`install_as`.

    Returns:
        Forward and backward.
    """

    def ms_deform_attn_forward(
        value: Tensor, spatial_shapes: Tensor, level_start_index: Tensor, sampling_loc: Tensor, attn_weight: Tensor, im2col_step: int
    ) -> Tensor:
        """[B, S, M, C] values, [B, Q, M, L, P, 2] locations and [B, Q, M, L, P] weights -> [B, Q, M * C]."""
        return ms_deform_attn(value, spatial_shapes, sampling_loc, attn_weight, level_start_index=level_start_index)

    def ms_deform_attn_backward(
        value: Tensor,
        spatial_shapes: Tensor,
        level_start_index: Tensor,
        sampling_loc: Tensor,
        attn_weight: Tensor,
        grad_output: Tensor,
        im2col_step: int,
    ) -> list[Tensor]:
        """Gradients of value, locations and weights."""
        inputs = value, spatial_shapes, sampling_loc, attn_weight
        return list(ms_deform_attn_gradients(grad_output, *inputs, level_start_index=level_start_index, deterministic=deterministic))

    return ms_deform_attn_forward, ms_deform_attn_backward


def filling_functions(deterministic: bool | None) -> Functions:
    """The two functions of mmcv's extension, whose backward fills tensors of its caller.

    Args:
        deterministic: see :func:`install_as`.

    Returns:
        Forward and backward.
    """

    def ms_deform_attn_forward(
        value: Tensor,
        value_spatial_shapes: Tensor,
        value_level_start_index: Tensor,
        sampling_locations: Tensor,
        attention_weights: Tensor,
        im2col_step: int,
    ) -> Tensor:
        """[B, S, M, C] values, [B, Q, M, L, P, 2] locations and [B, Q, M, L, P] weights -> [B, Q, M * C]."""
        return ms_deform_attn(value, value_spatial_shapes, sampling_locations, attention_weights, level_start_index=value_level_start_index)

    def ms_deform_attn_backward(
        value: Tensor,
        value_spatial_shapes: Tensor,
        value_level_start_index: Tensor,
        sampling_locations: Tensor,
        attention_weights: Tensor,
        grad_output: Tensor,
        grad_value: Tensor,
        grad_sampling_loc: Tensor,
        grad_attn_weight: Tensor,
        im2col_step: int,
    ) -> None:
        """Adds to `grad_value`, as mmcv's kernel does, and overwrites the other two."""
        inputs = value, value_spatial_shapes, sampling_locations, attention_weights
        grads = ms_deform_attn_gradients(grad_output, *inputs, level_start_index=value_level_start_index, deterministic=deterministic)
        grad_value.add_(grads[0])
        grad_sampling_loc.copy_(grads[1])
        grad_attn_weight.copy_(grads[2])

    return ms_deform_attn_forward, ms_deform_attn_backward


@dataclass(frozen=True)
class _Extension:
    """An extension module.

    Attributes:
        functions: makes its two functions.
        users: modules that keep it as a global.
        has_others: whether importers ask for further functions.
    """

    functions: Callable[[bool | None], Functions] = returning_functions
    users: Sequence[str] = ()
    has_others: bool = False


_EXTENSIONS = {
    "MultiScaleDeformableAttention": _Extension(),
    "detrex._C": _Extension(users=("detrex.layers.multi_scale_deform_attn",)),
    "groundingdino._C": _Extension(users=("groundingdino.models.GroundingDINO.ms_deform_attn",)),
    "mmcv._ext": _Extension(filling_functions, has_others=True),
}
