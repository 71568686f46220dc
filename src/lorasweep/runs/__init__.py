"""A pack of runs from images to scored, logged checkpoints, and what is asked of such runs later.

In come checked `Run`s (config/); out go reports of each epoch, for whoever waits for them. Open
session.py first, then prepare.py (images, captions, latents) and run_folder.py. resume.py goes on
with what was broken off, pick_checkpoint.py chooses, doctor.py checks the machine beforehand.

Nothing is imported here, so that a command loads only what it needs.
"""
