"""`python -m alpha_clip` is `alpha-clip`."""

import sys

from alpha_clip.cli import main

sys.exit(main())
