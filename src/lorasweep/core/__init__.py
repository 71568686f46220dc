"""What every room uses and what knows none of them: settings, random streams, safe files.

A component of conf/ is a frozen dataclass that derives from `Settings` (settings.py, the file to
open first); components.py has the names by which conf/ calls them. Files are written whole
(atomic_write.py) and foreign headers are checked before use (safetensors_header.py). All draws come
from keyed streams (rng.py). Interrupts, progress bars, git and terminal text have a file each.

Nothing is imported here, so that `lorasweep --help` answers at once: pydantic alone takes 0.2 s.
"""
