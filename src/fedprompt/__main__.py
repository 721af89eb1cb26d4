"""`python -m fedprompt`: the same program as the `fedprompt` script."""

from fedprompt.cli.main import main

if __name__ == "__main__":
    main()
