"""How late may alpha enter? What it costs in accuracy, and saves in time."""
