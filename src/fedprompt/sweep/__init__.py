"""Many runs over a search space: its file, its folder, its table, and Ray Tune. Imports `runs`."""
