"""``python -m toughen`` is ``toughen``."""

import sys

from toughen.cli import main

sys.argv[0] = "toughen"  # what a run's provenance tells as its command
sys.exit(main())
