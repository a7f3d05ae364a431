"""``python -m fly_jax`` is the ``fly-jax`` command."""

import sys

from fly_jax.cli.main import main

sys.exit(main())
