"""`python -m jaxpar`: see `jaxpar.cli`."""

import sys

from jaxpar.cli import main

if __name__ == "__main__":
    sys.exit(main(own_process=True))
