"""Has the surface of GroundingDINO around deformable attention; survives a missing extension."""
