"""`python -m dist_train` and `dist-train`: the only door from here to the command line."""

import sys


def main() -> None:
    """Run the command line and leave with its exit code."""
    from dist_train.launch.cli import main as command_line

    sys.exit(command_line(sys.argv[1:]))


if __name__ == "__main__":
    main()
