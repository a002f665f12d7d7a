"""The studies of tools/claims import each other by name, as scripts of one folder do."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "tools" / "claims"))
