"`python -m mlan`: the command line."
import sys

from mlan.command_line import main

sys.exit(main())
