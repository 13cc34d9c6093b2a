"""The step of Semi-DETR waits for the device once, to learn how many queries it needs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from no_sync import no_sync
from semi_detr_models import make_model, make_views
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ssod_fast.methods.semi_detr import branches

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []  # where a GPU is, these are tests of it
STAGE1, STAGE2 = 3, 12  # iterations on both sides of switch_at = 10


class Reads(TorchFunctionMode):
    """Counts what makes the host wait."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        waits = (Tensor.tolist, Tensor.item, Tensor.cpu, Tensor.__bool__, Tensor.__int__, Tensor.__float__, Tensor.nonzero)
        self.count += func in waits
        return func(*args, **(kwargs or {}))


OTHERWISE = {"content": "cross", "mask_group_padding": True, "consistency_stages": (1, 2)}


@pytest.mark.parametrize("family", ["dino", "deformable_detr"])
@pytest.mark.parametrize("step", [STAGE1, STAGE2])
@pytest.mark.parametrize("options", [{}, OTHERWISE], ids=["official", "otherwise"])
def test_no_wait_but_for_one_read(family: str, step: int, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model(family, dtype=torch.float32, **options).to(DEVICE)
    labeled, unlabeled = make_views(step)
    views = labeled.to(DEVICE), unlabeled.to(DEVICE)
    read, answers = branches.UnsupervisedBranch._read, []

    def remember(self: Any, *args: Any) -> Any:
        with Reads() as reads:
            answers.append(read(self, *args))
        assert reads.count == 1
        return answers[-1]

    with monkeypatch.context() as patch:
        patch.setattr(branches.UnsupervisedBranch, "_read", remember)
        expected = model.training_step(*views, step).losses
    assert len(answers) == 1
    model.method._last = step - 1  # type: ignore[attr-defined]  # the same noise again
    monkeypatch.setattr(branches.UnsupervisedBranch, "_read", lambda self, *args: answers[0])
    with no_sync():
        out = model.training_step(*views, step)
        out.loss.backward()
    assert all(torch.equal(out.losses[name], term) for name, term in expected.items())
