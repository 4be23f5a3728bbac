"""What a run will need, before it runs: its memory, traffic and time, and the strategy that fits."""
