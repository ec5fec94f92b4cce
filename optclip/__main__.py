"""`python -m optclip`, the same as the console script `optclip`."""

import sys

from optclip.choosing.advise import main

if __name__ == "__main__":
    sys.exit(main())
