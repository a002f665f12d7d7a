"""What a run is told: its fields, the checks on them, files and command lines."""
