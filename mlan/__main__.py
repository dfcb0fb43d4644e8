"`python -m mlan`: the command line."
import sys

from mlan.command_line import main

if __name__ == "__main__":                                   # the processes of `experiments --jobs` read this file, too
    sys.exit(main())
