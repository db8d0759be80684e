"""What a run is on the disk: its folder, checkpoints and log."""
