"""`python -m ao`."""

import sys

from ao.integrations.command_line.program import main

sys.exit(main())
