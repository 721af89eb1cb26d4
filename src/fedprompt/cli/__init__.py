"""The command line. `main` is the program; each other file is a command or serves one."""
