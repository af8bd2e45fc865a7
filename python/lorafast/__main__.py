"""`python -m lorafast`."""

import sys

from lorafast._cli import main

sys.exit(main())
