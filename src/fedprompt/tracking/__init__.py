"""What follows a run: loggers that get its figures, and callbacks that may stop it."""
