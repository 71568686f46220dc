"""What every room uses and what knows none of them: settings, random streams, safe files.

A component of conf/ is a frozen dataclass that derives from `Settings`: open settings.py first. Its
short name in conf/ is in components.py. Files are written whole by atomic_write.py, and all random
draws come from keyed streams (rng.py). Each other file has one small tool, which its name says.

Nothing is imported here, so that `lorasweep --help` answers at once: pydantic alone takes 0.2 s.
"""
