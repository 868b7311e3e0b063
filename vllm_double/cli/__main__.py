"""``python -m vllm_double.cli``."""

import sys

from vllm_double.cli import main

sys.exit(main())
