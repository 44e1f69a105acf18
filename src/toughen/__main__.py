"""``python -m toughen`` is ``toughen``."""

import sys

from toughen.cli import main

sys.exit(main())
