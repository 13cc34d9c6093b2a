"""Has the surface of detrex around deformable attention."""
