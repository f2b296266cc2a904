"""What the scripts share, one concern per file. Nothing here imports a script."""
