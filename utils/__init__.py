"""What the scripts share, one concern a file. Nothing here imports a script."""
