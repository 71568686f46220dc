"""Captioners: images come in, one caption for each goes out. One file a captioner.

Open caption_images.py first: it has what a captioner is, and makes only what the cache lacks.
"""
