"""`python -m fedprompt`: the same program as the `fedprompt` script."""

from fedprompt.cli import main

if __name__ == "__main__":
    main()
