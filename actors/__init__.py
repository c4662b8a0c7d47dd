"""The core of yolofleet: everything that runs inside an actor.

Nothing here knows HTTP. The import table is held by ``tests/unit/test_imports.py``.
"""

import os

# A server must not change the machine that it runs on. Read when ultralytics is imported.
os.environ.setdefault("YOLO_AUTOINSTALL", "false")
