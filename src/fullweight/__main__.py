"""`python -m fullweight`, which torchrun can launch."""

import sys

from fullweight.cli.main import main

sys.exit(main())
