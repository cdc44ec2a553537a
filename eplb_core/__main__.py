"""`python -m eplb_core` is the `eplb` command."""

from eplb_core.cli import main

if __name__ == "__main__":
    main()
