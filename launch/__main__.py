"""`python -m evspan.launch` is the `evspan` command."""

from evspan.launch.cli.main import main

if __name__ == "__main__":
    main()
