"""Lets `from posttrain.common... import` work from a plain checkout, whatever the working directory.

The package's path is the checkout itself; the checkout never goes on sys.path, where our `kernels/` would
shadow the Hugging Face package of that name. `pip install -e .` gives the same names to copied scripts.
"""

from pathlib import Path

__path__ = [str(Path(__file__).resolve().parents[1])]
