"""`python -m keras_server`: serves, as `keras-server` and `python run_keras_server.py` do."""

import sys

from run_keras_server import main

if __name__ == "__main__":
    sys.exit(main())
