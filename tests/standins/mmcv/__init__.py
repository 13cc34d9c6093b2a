"""Has the surface of mmcv around deformable attention."""
