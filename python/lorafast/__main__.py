"""`python -m lorafast`."""

import sys

from lorafast._cli.main import main

sys.exit(main())
