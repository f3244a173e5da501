"""Imported first, and for its effect: the environment in which nothing looks for GPUs or a network.

Nothing heavy is imported here: libraries read these variables when they are imported.
"""

from __future__ import annotations

import os
import tempfile

os.environ.setdefault("AXOLOTL_DO_NOT_TRACK", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("ACCELERATE_USE_CPU", "true")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# What is kept between runs (maps of vocabularies) is not to be the user's.
os.environ.setdefault("AXOLOTL_DSKD_CACHE", tempfile.mkdtemp(prefix="axolotl-dskd-"))
