"""The command line, as `python -m fastprior.cli`."""

import sys

from fastprior.cli.command_line import main

sys.exit(main())
