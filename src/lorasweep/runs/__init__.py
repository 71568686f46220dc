"""The main job: typed runs come in, scored and logged checkpoints go out, pack by pack.

Open session.py first: `Session` draws, captions and encodes the images (prepare.py), trains, judges
each epoch and logs it. run_folder.py guards a run's folder, resume.py finds what was broken off,
trained_before.py what an earlier sweep has trained, provenance.py notes what a run was made with.
Beside it `lorasweep pick` (pick_checkpoint.py, its table and README) and `lorasweep doctor`
(doctor.py, its probes).

Nothing is imported here, so that `lorasweep doctor` and `pick` don't wait for the trainer.
"""
