"""``python -m command`` in a checkout: what ``kvmreq`` is where it is installed."""

import sys

from command.main import main

sys.exit(main())
