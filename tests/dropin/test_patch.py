from __future__ import annotations

import copy
import pickle
from types import ModuleType

import pytest
from torch import nn

from ssod_fast.dropin import _patch
from ssod_fast.dropin._patch import NothingPatched, Plan, UnknownSurface


class Base:
    def run(self) -> str:
        return "base"


class Child(Base):
    pass


def fast(self: Base) -> str:
    return "fast"


def test_an_inherited_method_is_replaced_on_the_class_alone_and_put_back() -> None:
    assert _patch.replace(Child, "run", fast)
    assert (Child().run(), Base().run()) == ("fast", "base")
    assert _patch.restore(Child, "run")
    assert Child().run() == "base"
    assert "run" not in vars(Child)
    assert _patch._RECORD not in vars(Child)


def test_a_second_replacement_and_a_second_restoration_change_nothing() -> None:
    module = ModuleType("some_module")
    module.f = len  # type: ignore[attr-defined]
    assert _patch.replace(module, "f", sum)
    assert not _patch.replace(module, "f", max)
    assert module.f is sum  # type: ignore[attr-defined]
    assert _patch.original(module, "f") is len
    assert _patch.restore(module, "f")
    assert not _patch.restore(module, "f")
    assert module.f is len  # type: ignore[attr-defined]


def test_a_submodule_is_replaced_where_pytorch_keeps_it() -> None:
    model = nn.Sequential(nn.ReLU())
    old = model[0]
    _patch.replace(model, "0", nn.GELU())
    assert isinstance(model[0], nn.GELU)
    assert [type(m) for m in model.modules()] == [nn.Sequential, nn.GELU]
    _patch.restore(model, "0")
    assert model[0] is old


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_keep_their_patches_and_can_be_unpatched(duplicate) -> None:
    model = nn.Sequential(nn.ReLU())
    _patch.replace(model, "0", nn.GELU())
    twin = duplicate(model)
    assert _patch.is_replaced(twin, "0")
    assert _patch.restore_places(_patch.places_in(twin, "0")) == 1
    assert isinstance(twin[0], nn.ReLU)
    assert isinstance(model[0], nn.GELU)


def test_a_later_change_by_somebody_else_is_not_lost() -> None:
    module = ModuleType("some_module")
    _patch.replace(module, "f", sum)
    module.f = max  # type: ignore[attr-defined]
    with pytest.raises(RuntimeError, match=r"some_module\.f has been replaced again since ssod_fast patched it"):
        _patch.restore(module, "f")
    assert module.f is max  # type: ignore[attr-defined]


def test_all_places_are_put_back_or_none() -> None:
    model = nn.Sequential(nn.ReLU(), nn.Sequential(nn.ReLU()))
    for owner, name in ((model[0], "forward"), (model[1][0], "forward")):
        _patch.replace(owner, name, abs)
    model[1][0].forward = max
    with pytest.raises(RuntimeError, match=r"^1\.0\.forward has been replaced again since ssod_fast patched it"):
        _patch.restore_places(_patch.places_in(model, "forward"))
    assert model[0].forward is abs
    model[1][0].forward = abs
    assert _patch.restore_places(_patch.places_in(model, "forward")) == 2
    assert _patch.places_in(model, "forward") == []


def plan_for(module: ModuleType) -> Plan:
    plan = Plan()
    plan.add(module, "f", sum)
    plan.add(module, "g", max, label="the other")
    return plan


def test_a_plan_counts_and_undoes() -> None:
    module = ModuleType("some_module")
    patched = plan_for(module).apply("nothing")
    assert patched.count == 2
    assert patched.places == ("some_module.f", "the other")
    patched.undo()
    patched.undo()
    assert not hasattr(module, "f")
    assert not hasattr(module, "g")


def test_an_inner_call_does_not_undo_the_outer_one() -> None:
    module = ModuleType("some_module")
    with plan_for(module).apply("nothing"):
        with plan_for(module).apply("nothing") as inner:
            assert inner.count == 2
        assert _patch.is_replaced(module, "f")
    assert not hasattr(module, "f")


def test_other_options_are_refused_and_equal_ones_change_nothing() -> None:
    module = ModuleType("some_module")

    def plan(name: str, exact: bool | None) -> Plan:
        made = Plan("undo_it", exact=exact)
        made.add(module, name, sum)
        made.add(module, "f", sum)
        return made

    plan("f", True).apply("nothing")
    assert plan("f", True).apply("nothing").count == 2
    with pytest.raises(ValueError, match=r"^some_module\.f is patched with exact=True, .* exact=None .*: call undo_it first$"):
        plan("g", None).apply("nothing")
    assert not _patch.is_replaced(module, "g")
    assert plan("f", None).revert() == 1
    assert plan("g", None).apply("nothing").count == 2


def test_what_is_no_switch_is_refused() -> None:
    _patch.check_switch("fast", True)
    _patch.check_switch("fast", None, optional=True)
    with pytest.raises(TypeError, match=r"^fast must be True or False, got None$"):
        _patch.check_switch("fast", None)
    with pytest.raises(TypeError, match=r"^fast must be True or False or None, got 1$"):
        _patch.check_switch("fast", 1, optional=True)


def test_an_empty_plan_raises() -> None:
    with pytest.raises(NothingPatched, match="no such layer"):
        Plan().apply("no such layer")


def test_a_missing_package_is_named() -> None:
    with pytest.raises(ImportError, match=r"no_such_module_x\.y cannot be imported: install no-such"):
        _patch.require("no_such_module_x.y", "no-such")
    assert _patch.optional("no_such_module_x.y") is None
    assert _patch.optional("torch.no_such_part") is None


def test_other_parameters_are_refused() -> None:
    def function(a, *rest, b=1, **more):
        pass

    _patch.check_parameters(function, "f", ["x"], ["a", "*rest", "b", "**more"])
    with pytest.raises(UnknownSurface, match=r"f takes \(a, \*rest, b, \*\*more\), expected \(a, b\) or \(a\): .*nothing was patched"):
        _patch.check_parameters(function, "f", ["a", "b"], ["a"])
