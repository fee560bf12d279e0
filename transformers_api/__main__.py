"""``python -m transformers_api``: the command line."""

import sys

from transformers_api.cli import main

sys.exit(main())
