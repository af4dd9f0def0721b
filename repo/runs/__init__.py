"""The run folder: records, checkpoints, loggers, the console, interrupts."""
