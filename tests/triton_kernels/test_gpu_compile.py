"""The Triton kernels compile for GPUs on a machine that has none, with exact divisions and without contraction."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parent.parent / "gpu_compile.py"
KERNELS = {
    "box_iou_fwd_kernel",
    "box_iou_bwd_kernel",
    "ragged_box_iou_fwd_kernel",
    "paired_box_iou_fwd_kernel",
    "paired_box_iou_bwd_kernel",
    "box_iou_max_kernel",
    "box_iou_below_kernel",
    "compose_images_kernel",
    "compose_boxes_kernel",
    "cache_write_kernel",
    "encode_boxes_fwd_kernel",
    "encode_boxes_bwd_kernel",
    "decode_boxes_fwd_kernel",
    "decode_boxes_bwd_kernel",
    "neighborhood_boxes_kernel",
    "point_boxes_kernel",
    "random_negative_boxes_kernel",
    "matching_cost_kernel",
    "row_extrema_kernel",
    "linear_assignment_kernel",
    "gmm_threshold_kernel",
    "batched_nms_kernel",
    "class_sums_kernel",
    "reached_kernel",
    "choose_kernel",
    "claim_kernel",
    "contest_kernel",
    "trim_kernel",
    "rescue_kernel",
    "finish_kernel",
    "ms_deform_attn_fwd_kernel",
    "ms_deform_attn_bwd_kernel",
}


@pytest.mark.slow
def test_every_kernel_compiles(tmp_path: Path) -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}  # a cached result would prove nothing
    done = subprocess.run([sys.executable, str(SCRIPT)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert set(done.stdout.split()) == KERNELS
